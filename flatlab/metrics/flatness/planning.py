"""Sampling plans: goal, radii, blocks and pairs, slopes. Plans that depend on timings are stored as a unit."""

from collections.abc import Sequence
from dataclasses import astuple
from functools import partial

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray, distances, finite, whole
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness import pilot, slope
from flatlab.metrics.flatness.sampler import Goal, Sampler
from flatlab.results.sphere import SamplingPlan
from flatlab.seeds import derive

BUDGET = 100  # default number of passes over the data for each radius, as in SWAD's script
SLOPES = 1.5  # maximum cost of the slopes, relative to that of a fixed number of directions


def goal_of(
    landscape: Landscape, count: int, num_samples: int | None, errors: tuple[float, float], budget: float | None
) -> Goal:
    """Return the stopping criterion.

    Args:
        landscape: one of those that are measured.
        count: landscapes times radii.
        num_samples: fixed number of directions, each on all images; None: an accuracy target
        errors: rel_error and abs_error.
        budget: maximum number of images forwarded.

    Raises:
        UserError: if a number is out of range.
    """
    if num_samples is not None:
        return Goal(draws=whole("num_samples", num_samples, least=2))  # an interval needs a spread
    relative, absolute = finite("rel_error", errors[0], least=0.0), finite("abs_error", errors[1], least=0.0)
    if not relative + absolute > 0:
        raise UserError("rel_error and abs_error must not both be 0: give one of them, or num_samples.")
    if budget is None:
        return Goal(relative, absolute, BUDGET * landscape.num_samples * count)
    return Goal(relative, absolute, float("inf") if budget == float("inf") else finite("budget", budget, above=0.0))


def plans_of(sampler: Sampler, radii: FloatArray, goal: Goal) -> list[SamplingPlan]:
    """Return the plan of each radius above zero. A stored plan is reused, since it depends on timings.

    Raises:
        UserError: if the budget does not exceed the pilot's cost.
    """
    above, samples = above_zero(radii), sampler.landscapes[0].num_samples
    if goal.draws or not len(above) or samples < pilot.FEWEST:
        return [SamplingPlan(float(radius), 0, visits=goal.draws or 0) for radius in above]
    sampler.spent += pilot.price(sampler.landscapes, len(above), seed=sampler.seed)
    if goal.budget <= sampler.spent:
        raise UserError(
            f"A pilot at {len(above)} radii forwards {sampler.spent:,.0f} images, more than the budget of"
            f" {goal.budget:,.0f}: give a larger one, or num_samples, which needs no pilot."
        )

    def make() -> FloatArray:
        found = pilot.run_pilot(
            sampler.landscapes, above, seed=sampler.seed, normalisation=sampler.normalisation, value=sampler.value
        )
        return np.array([astuple(each) for each in pilot.plan(found, above, goal, samples)], dtype=float)

    kept = next(iter(sampler.keep([("plan", make)])))
    return [
        SamplingPlan(float(r), int(size), bool(paired), int(visits), *more) for r, size, paired, visits, *more in kept
    ]


def slopes_of(sampler: Sampler, plans: Sequence[SamplingPlan], goal: Goal) -> Sequence[FloatArray | None]:
    """Return the slopes of each landscape at the smallest radius; None without a radius above zero.

    Also None if samples of different shapes cannot share a block, or a fixed number of directions costs less than the
    slopes.

    Args:
        sampler: of the measurement.
        plans: of the radii above zero.
        goal: stopping criterion, whose budget may be too small for the slopes.
    """
    if not plans or not all(each.joinable for each in sampler.landscapes):
        return [None] * len(sampler.landscapes)
    radius = min(plan.radius for plan in plans)
    priced = sum(slope.price(each, seed=sampler.seed) for each in sampler.landscapes)
    fixed = goal.draws * len(plans) * sum(each.num_samples for each in sampler.landscapes) if goal.draws else np.inf
    if sampler.spent + priced > goal.budget or priced > SLOPES * fixed:
        return [None] * len(sampler.landscapes)
    sampler.spent += priced

    def make() -> FloatArray:
        found = partial(slope.slopes, radius=radius, seed=sampler.seed, normalisation=sampler.normalisation)
        return np.stack([found(each) for each in sampler.landscapes])

    return list(next(iter(sampler.keep([(f"slopes-{derive(radius):016x}", make)]))))


def above_zero(radii: FloatArray) -> FloatArray:
    """Return the radii that are sampled, each once, in the order in which they were given."""
    return np.array(list(dict.fromkeys(radii[radii > 0].tolist())))


def radii_of(sampler: Sampler, radii: npt.ArrayLike | str) -> FloatArray:
    """Return the radii as an array; "auto" spans the range in which F is 0.01 to 2, found by a small pilot.

    Args:
        sampler: of the measurement.
        radii: numbers, or "auto".

    Raises:
        UserError: if a radius is negative or not finite, or the text is not "auto".
    """
    if isinstance(radii, str):
        if radii != "auto":
            raise UserError(f'radii must be numbers or "auto", got {radii!r}.')
        sampler.spent += pilot.span_price(sampler)
        return next(iter(sampler.keep([("radii", lambda: pilot.span(sampler))])))
    return distances("radii", radii)
