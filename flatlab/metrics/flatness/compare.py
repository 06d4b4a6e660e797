"""Differences in flatness between two models, along common directions and on common blocks of images."""

import numpy as np
import numpy.typing as npt
import torch

from flatlab.arguments import FloatArray, Normalisation
from flatlab.errors import UserError, count_of
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import check_normalisation
from flatlab.metrics.flatness.sampler import DrawsReport, Sampler
from flatlab.metrics.flatness.sphere import sample
from flatlab.results.sphere import PairedDifference, SphereFlatness
from flatlab.seeds import base_seed


def compare_flatness(
    a: Landscape,
    b: Landscape,
    radii: npt.ArrayLike | str,
    *,
    num_samples: int | None = None,
    rel_error: float = 0.02,
    abs_error: float = 1e-4,
    budget: float | None = None,
    seed: int | torch.Generator = 0,
    normalisation: Normalisation = "none",
    report: DrawsReport | None = None,
) -> PairedDifference:
    """Measure the flatness of two models of one architecture along the same directions, on the same blocks of images.

    Sampling stops when the standard error of the *difference* is small: `rel_error` of the larger of the two values.
    The arguments are those of `sphere_flatness`.

    Raises:
        UserError: if the two differ in their parameters, data or loss.
    """
    shapes = [[tensor.shape for tensor in each.split(each.point)] for each in (a, b)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "A comparison needs models of one architecture, but their parameters have different shapes"
            f" ({a.num_params:,} and {count_of(b.num_params, 'number')})."
        )
    if not a.shares_data(b):
        ours, theirs = a.num_samples, b.num_samples
        numbers = f"though equally many, {ours:,}" if ours == theirs else f"{ours:,} and {theirs:,}"
        raise UserError(
            "A comparison needs the same data in the same order, but the two landscapes have different samples"
            f" ({numbers}): pass the same batches."
        )
    if not a.shares_loss(b):
        raise UserError(
            "A comparison needs one loss function, but the losses of the two landscapes differ at the second one's"
            " point: pass the same function."
        )
    b.refuse_foreign(a)
    a.refuse_foreign(b)
    sampler = Sampler([a, b], base_seed(seed), check_normalisation(normalisation, a), value=_difference)
    return paired_difference(*sample(sampler, radii, num_samples, (rel_error, abs_error), budget, report=report))


def paired_difference(a: SphereFlatness, b: SphereFlatness) -> PairedDifference:
    """Return the difference a - b along the directions on which both were evaluated.

    Results do not contain their data: that both are of one architecture, loss and data must be ensured by the caller;
    `compare_flatness` checks it.

    Raises:
        UserError: if the two were not measured along the same directions, at the same radii, on the same blocks.
    """
    for name in ("seed", "device", "normalisation", "num_params", "radii", "blocks", "paired"):
        of_a, of_b = getattr(a, name), getattr(b, name)
        if not np.array_equal(of_a, of_b):
            raise UserError(
                f"A paired difference needs the same directions, but {name} differs ({of_a} and {of_b}):"
                f" measure both with one {name}, or both at once by compare_flatness."
            )
    counts = [[len(rises) for rises in each.visits] for each in (a, b)]
    if counts[0] != counts[1]:
        raise UserError(
            f"A paired difference needs equal numbers of draws, got {counts[0]} and {counts[1]}: use one num_samples"
            " for both, or measure both at once by compare_flatness."
        )
    return PairedDifference(cost=a.cost + b.cost, radii=a.radii, a=a, b=b)


def _difference(rises: FloatArray) -> FloatArray:
    return np.asarray(rises[0] - rises[1])
