"""Is one minimum flatter than another? Differences along common rays, on common blocks of images."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.rays import Normalisation, check_normalisation
from flatlab.metrics.results import MISSED, Estimate, FloatArray, Sampled
from flatlab.metrics.rounds import estimate
from flatlab.metrics.sampling import Report, Sampler
from flatlab.metrics.sentences import missed, verdict
from flatlab.metrics.sphere import SphereFlatness, sample
from flatlab.seeds import base_seed


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedDifference(Sampled):
    """F of one model less F of another, visit by visit: what rays and images have in common drops out.

    Attributes:
        radii: (R,) as in the two measurements.
        a: the first measurement.
        b: the second, along the same rays.
    """

    radii: FloatArray
    a: SphereFlatness
    b: SphereFlatness

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.radii

    @property
    def raw(self) -> list[FloatArray]:
        """The differences (J,) at each radius, the mean over the strata."""
        return [(a - b).mean(axis=1) for a, b in zip(self.a.visits, self.b.visits, strict=True)]

    @property
    def estimates(self) -> list[Estimate]:
        """Mean difference at each radius, with its standard error."""
        return [estimate(draws, blocks) for draws, blocks in zip(self.raw, self.a.blocks, strict=True)]

    @property
    def converged(self) -> bool:
        """Whether both measurements are, at all radii."""
        return all(self.reached)

    @property
    def reached(self) -> list[bool]:
        """Whether both measurements are as accurate as was asked for, at each radius."""
        return [a and b for a, b in zip(self.a.reached, self.b.reached, strict=True)]

    @property
    def remarks(self) -> list[str]:
        """Sentences on the radii at which the accuracy that was asked for is not reached; often none."""
        stopped = [one if one in MISSED else two for one, two in zip(self.a.stopped, self.b.stopped, strict=True)]
        return missed(self.radii, stopped, self.stderr)

    def ratio(self, level: float = 0.95) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return F_a / F_b at each radius with its interval (value, low, high), by the delta method.

        Where F_b cannot be told from zero, so that a ratio means nothing, all three are NaN.
        """
        rows = []
        for a, b, blocks in zip(self.a.visits, self.b.visits, self.a.blocks, strict=True):
            below, above = estimate(b.mean(axis=1), blocks), estimate(a.mean(axis=1), blocks)
            if not below.value > below.half_width(level):
                rows.append((np.nan, np.nan, np.nan))
                continue
            value = above.value / below.value
            spread = estimate((a - value * b).mean(axis=1) / below.value, blocks)
            rows.append((value, value - spread.half_width(level), value + spread.half_width(level)))
        value, low, high = np.array(rows).T
        return value, low, high

    def verdict(self, a: str = "the first", b: str = "the second", level: float = 0.95) -> str:
        """Say in a sentence which of the two checkpoints is flatter, and up to which radius; of these images only.

        The level is that of the sentence as a whole, by Holm's method over the radii: it names one of two checkpoints
        that are equally flat with a probability of 1 - level at most, however many radii there are.
        """
        return verdict(self.estimates, self.radii, (a, b), level=level)


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
    report: Report | None = None,
) -> PairedDifference:
    """Measure the flatness of two models of one architecture along the same rays, on the same blocks of images.

    Sampling stops when the standard error of the *difference* is small: `rel_error` of the larger of the two values.
    The arguments are those of `sphere_flatness`.

    Raises:
        UserError: where the two have not the same parameters, or not the same data.
    """
    shapes = [[tensor.shape for tensor in each.split(each.point)] for each in (a, b)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "A comparison needs models of one architecture, but their parameters have other shapes"
            f" ({a.num_params:,} and {b.num_params:,} numbers)."
        )
    if not a.shares_data(b):
        raise UserError(
            "A comparison needs the same data in the same order, but the two landscapes lie over different samples"
            f" ({a.num_samples:,} and {b.num_samples:,}): hand in the same batches."
        )
    sampler = Sampler([a, b], base_seed(seed), check_normalisation(normalisation, a), value=_difference)
    return paired_difference(*sample(sampler, radii, num_samples, (rel_error, abs_error), budget, report=report))


def paired_difference(a: SphereFlatness, b: SphereFlatness) -> PairedDifference:
    """Return the difference a - b along the rays that both have walked.

    Raises:
        UserError: if the two were not measured along the same rays, at the same radii, on the same blocks.
    """
    for name in ("seed", "normalisation", "num_params", "radii", "blocks", "paired"):
        of_a, of_b = getattr(a, name), getattr(b, name)
        if not np.array_equal(of_a, of_b):
            raise UserError(
                f"A paired difference needs the same rays, but {name} differs ({of_a} and {of_b}):"
                f" measure both with one {name}, or both at once by compare_flatness."
            )
    counts = [[len(rises) for rises in each.visits] for each in (a, b)]
    if counts[0] != counts[1]:
        raise UserError(
            f"A paired difference needs the same visits, but their numbers differ ({counts[0]} and {counts[1]}):"
            " give both one num_samples, or measure both at once by compare_flatness."
        )
    return PairedDifference(cost=a.cost + b.cost, radii=a.radii, a=a, b=b)


def _difference(rises: FloatArray) -> FloatArray:
    return np.asarray(rises[0] - rises[1])
