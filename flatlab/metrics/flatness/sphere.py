"""Flatness on a sphere: the rise of the loss at distance gamma from a minimum, in a random direction."""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from flatlab.arguments import FloatArray, Normalisation, whole
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness import planning
from flatlab.metrics.flatness.caveats import coarse, rounded, unseen
from flatlab.metrics.flatness.perturbations import check_normalisation, reach
from flatlab.metrics.flatness.sampler import Draws, DrawsReport, Sampler
from flatlab.results.estimate import Cost
from flatlab.results.sphere import SamplingPlan, SphereFlatness
from flatlab.seeds import base_seed


def sphere_flatness(
    landscape: Landscape,
    radii: npt.ArrayLike | str,
    *,
    num_samples: int | None = None,
    rel_error: float = 0.02,
    abs_error: float = 1e-4,
    budget: float | None = None,
    seed: int | torch.Generator = 0,
    normalisation: Normalisation = "none",
    report: DrawsReport | None = None,
) -> SphereFlatness:
    """Measure F_gamma(w), the mean rise of the loss on spheres around w (arXiv 2410.06020, Eq. 5).

    For an accuracy target, a pilot chooses the design: small blocks of images for each direction, in rounds over all
    images, with or without antithetic pairs. With `num_samples`, each direction is evaluated at every radius on all
    images: the crossed design of SWAD's script. On a quadratic loss with Hessian H, F = gamma^2 tr(H) / (2 P).

    Args:
        landscape: the loss around w.
        radii: (R,) distances gamma, relative radii rho with a normalisation, or "auto": six that span F = 0.01 to 2.
        num_samples: fixed number K of directions, each on all images, instead of an accuracy target.
        rel_error: standard error / |F| at which sampling stops.
        abs_error: absolute standard error (nats) at which sampling also stops.
        budget: maximum number of images forwarded; by default 100 passes for each radius.
        seed: of the directions; use the same for all models that are to be compared. For an accuracy target the pilot
            times blocks, so that two calls can plan differently; their values then differ within the intervals.
        normalisation: "filter", "layer" or "parameter": radii relative to the weights' norms (Dinh et al. 2017).
        report: called with the draws at each radius after each unit.
    """
    sampler = Sampler([landscape], base_seed(seed), check_normalisation(normalisation, landscape))
    return sample(sampler, radii, num_samples, (rel_error, abs_error), budget, report=report)[0]


def sample(
    sampler: Sampler,
    radii: npt.ArrayLike | str,
    num_samples: int | None,
    errors: tuple[float, float],
    budget: float | None,
    *,
    block_size: int | None = None,
    report: DrawsReport | None = None,
) -> list[SphereFlatness]:
    """Measure a sampler's landscapes together; the arguments are those of `sphere_flatness`.

    With `block_size`, sampling is in antithetic pairs without a pilot: a plan that does not depend on timings is the
    same on every machine.
    """
    start = time.perf_counter()
    places = planning.radii_of(sampler, radii)
    above = planning.above_zero(places)
    count = len(sampler.landscapes) * len(above)
    goal = planning.goal_of(sampler.landscapes[0], count, num_samples, errors, budget)
    if block_size is not None and whole("block_size", block_size) and num_samples is None:
        size = block_size if block_size < sampler.landscapes[0].num_samples else 0
        plans = [SamplingPlan(float(radius), size, paired=True) for radius in above]
    else:
        plans = planning.plans_of(sampler, places, goal)
    tilts = planning.slopes_of(sampler, plans, goal)
    per_radius = sampler.run(plans, goal, report=report)
    seconds = time.perf_counter() - start
    return [
        replace(assemble(sampler, which, places, per_radius, seconds), slopes=tilt) for which, tilt in enumerate(tilts)
    ]


def assemble(
    sampler: Sampler, which: int, radii: FloatArray, per_radius: Sequence[Draws], seconds: float
) -> SphereFlatness:
    """Return the result of one landscape, with its share of the cost; radius 0 is 0, and was not sampled."""
    landscape, spent = sampler.landscapes[which], sampler.spent / len(sampler.landscapes)
    by_radius = {draws.plan.radius: draws for draws in per_radius}
    longest = max((draws.visits.shape[1] for draws in per_radius), default=2)
    still = Draws(
        SamplingPlan(0.0, 0), 1, np.zeros((len(sampler.landscapes), longest, len(landscape.strata))), "samples"
    )
    each = [by_radius.get(float(radius), still) for radius in radii]
    lost = rounded(landscape, radii[radii > 0], sampler.normalisation)
    found = SphereFlatness(
        radii=radii,
        visits=tuple(draws.visits[which] for draws in each),
        plans=tuple(draws.plan for draws in each),
        blocks=tuple(draws.blocks for draws in each),
        stopped=tuple(draws.stopped for draws in each),
        cost=Cost(spent / landscape.num_samples, int(spent), 0, seconds / len(sampler.landscapes)),
        strata=landscape.strata,
        base_loss=landscape.base_loss,
        normalisation=sampler.normalisation,
        seed=sampler.seed,
        num_params=landscape.num_params,
        norm=landscape.norm,
        reach=reach(landscape, sampler.normalisation),
        device=landscape.device.type,
        notes=(*landscape.remarks, *unseen(landscape, per_radius), *([lost] if lost else [])),
    )
    return replace(found, notes=(*found.notes, *coarse(landscape, found)))
