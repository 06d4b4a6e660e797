"""Caveats of a measured value: images that were not evaluated, and steps that the weights' dtype cannot represent."""

from collections.abc import Sequence

import torch

from flatlab.arguments import FloatArray
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.flatness.sampler import Draws
from flatlab.results.sphere import Normalisation

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


def rounded(landscape: Landscape, radii: FloatArray, normalisation: Normalisation = "none") -> str:
    """Return a sentence on the radii whose steps the weights' own dtype cannot represent; empty if there are none.

    Args:
        landscape: the loss around w.
        radii: (R,) distances above zero.
        normalisation: of the directions.
    """
    w, ratios = landscape.point, {}
    kind = next(iter(landscape.named.values())).dtype  # of the model
    direction = draw_direction(landscape, 0, 0, normalisation=normalisation)
    length = float(torch.linalg.vector_norm(direction, dtype=torch.float64))
    for radius in radii.tolist():
        stored = torch.add(w, direction.to(w), alpha=radius).to(kind).to(w).sub_(w)  # exact: both are of similar size
        ratio = float(torch.linalg.vector_norm(stored, dtype=torch.float64)) / (radius * length) if length else 1.0
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
