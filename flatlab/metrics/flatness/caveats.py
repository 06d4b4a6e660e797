"""Caveats of a measured value: images that were not evaluated, and what a dtype cannot represent."""

from collections.abc import Sequence

import numpy as np
import torch

from flatlab.arguments import FloatArray, Normalisation
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.flatness.sampler import Draws
from flatlab.results.sphere import SphereFlatness
from flatlab.tensors.flat import length

HELD = 0.005  # relative change of a step's length by rounding that is accepted: 1 % of F
WIDER = {torch.bfloat16: "float32", torch.float16: "float32", torch.float32: "float64"}
RARE = 3  # an event that did not occur in n draws has a probability below 3 / n, at 95 %


def unseen(landscape: Landscape, per_radius: Sequence[Draws]) -> list[str]:
    """Return a sentence if sampling stopped before a full round over the images; else none.

    Args:
        landscape: the loss.
        per_radius: the draws at each radius.
    """
    short = [draws for draws in per_radius if draws.visits.shape[1] < draws.blocks]
    if not short:
        return []
    count = landscape.num_samples
    seen = min(round(count * draws.visits.shape[1] / draws.blocks) for draws in short)
    places = ", ".join(f"{draws.plan.radius:g}" for draws in short)
    return [
        f"At radius {places}, sampling stopped after {seen:,} of {count:,} images: what fewer than about 1 in "
        f"{max(1, seen // RARE):,} images do may be missing from value and interval; num_samples evaluates all."
    ]


def coarse(landscape: Landscape, found: SphereFlatness) -> list[str]:
    """Return a sentence on the radii whose standard error is below the spacing of the loss's values; else none.

    Args:
        landscape: the loss.
        found: its flatness.
    """
    spacing = landscape.resolution
    where = [
        f"{radius:g}" for radius, error in zip(found.radii, found.stderr, strict=True) if radius and error < spacing
    ]
    if not where:
        return []
    return [
        f"The loss is {np.abs(landscape.base_loss).max():.3g}, and its values are {spacing:.2g} apart in its dtype, "
        f"more than the standard error at radius {', '.join(where)}: differences of that size are rounding, which the "
        "interval does not contain; rescale the loss, or measure a copy of model and data in float64."
    ]


def rounded(landscape: Landscape, radii: FloatArray, normalisation: Normalisation = "none") -> str:
    """Return a sentence on the radii whose steps the weights' own dtype cannot represent; empty if there are none.

    Args:
        landscape: the loss around w.
        radii: (R,) distances above zero.
        normalisation: of the directions.
    """
    ratios = {}
    kind = next(iter(landscape.named.values())).dtype  # of the model
    direction = draw_direction(landscape, 0, 0, normalisation=normalisation)
    long = float(length(direction))
    pairs = list(zip(landscape.parts, landscape.split(direction), strict=True))
    for radius in radii.tolist():
        # Exact: both are of similar size.
        stored = [length(torch.add(w, z, alpha=radius).to(kind).to(w).sub_(w)) for w, z in pairs]
        ratio = float(torch.stack(stored).norm()) / (radius * long) if long else 1.0
        if abs(ratio - 1) > HELD:
            ratios[radius] = ratio
    if not ratios:
        return ""
    found = ", ".join(f"{radius:g} ({ratio:.2f} times as long)" for radius, ratio in ratios.items())
    name = str(kind).removeprefix("torch.")
    return (
        f"Weights of {name} cannot hold steps of length {found}: the loss is that of other points; measure a copy of "
        f"the model in {WIDER.get(kind, 'a wider type')}, or larger radii."
    )
