"""Flatness on a sphere: how far the loss rises at distance gamma from a minimum, in a random direction."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from flatlab.errors import UserError, choose
from flatlab.landscape import Landscape
from flatlab.metrics import pilot
from flatlab.metrics.rays import Normalisation, check_normalisation, reach
from flatlab.metrics.results import Cost, Estimate, FloatArray, Sampled
from flatlab.metrics.rounds import estimate
from flatlab.metrics.sampling import Goal, Plan, Report, Sampler, Walk
from flatlab.seeds import base_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUDGET = 100  # passes over the data for each radius, where none is given: what SWAD's script spends


@dataclass(frozen=True, eq=False, kw_only=True)
class SphereFlatness(Sampled):
    """F_gamma(w) = E L(w + gamma u) - L(w) over unit vectors u, in nats (arXiv 2410.06020, Eq. 5).

    Attributes:
        radii: (R,) Euclidean distances; with another normalisation than "none" relative radii rho.
        visits: for each radius, rises (J, S) of the strata's mean losses, one row for each visit of a direction to
            a block of images; visit j saw block j mod B.
        plans: for each radius, how it was sampled: block size, pairs, and the visits foreseen.
        blocks: (R,) how many blocks B the images were cut into; 1 is the crossed design, each ray on all images.
        stopped: for each radius "samples", "accuracy", "budget", "nonfinite" (a rise is infinite or NaN, and so is
            F) or "interrupted".
        strata: names (S,) of the strata; they weigh equally in `value`.
        base_loss: (S,) mean loss at w.
        normalisation: "none": w + gamma u; else w + rho z with z as long as w in each filter, layer or parameter.
        seed: names the rays and the blocks; equal seeds walk equal rays.
        num_params: P, the dimension of the sphere's space.
        norm: Euclidean length of w.
        reach: Euclidean distance at radius 1: one, or the length of the weights that are scaled to.
        space: what was moved, "weights" or, of a quantized network, "baked" or "latent".
    """

    radii: FloatArray
    visits: tuple[FloatArray, ...]
    plans: tuple[Plan, ...]
    blocks: tuple[int, ...]
    stopped: tuple[str, ...]
    strata: tuple[str, ...]
    base_loss: FloatArray
    normalisation: Normalisation
    seed: int
    num_params: int
    norm: float
    reach: float = 1.0
    space: str = "weights"

    @property
    def estimates(self) -> list[Estimate]:
        """Mean rise at each radius, with its standard error over directions (and images, where these were sampled)."""
        return [estimate(rises.mean(axis=1), b) for rises, b in zip(self.visits, self.blocks, strict=True)]

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.radii

    @property
    def raw(self) -> list[FloatArray]:
        """The rises."""
        return list(self.visits)

    @property
    def samples(self) -> FloatArray:
        """Rises (K, R, S) of the crossed design: rays, radii, strata.

        Raises:
            UserError: where radii were sampled in blocks, each by its own plan: see `visits`.
        """
        if set(self.blocks) != {1} or len({len(rises) for rises in self.visits}) > 1:
            raise UserError("Only the crossed design (num_samples=...) has an array of samples; see `visits`.")
        stacked: FloatArray = np.stack(self.visits, axis=1)
        return stacked

    @property
    def paired(self) -> tuple[bool, ...]:
        """For each radius whether each ray was walked with its antithesis."""
        return tuple(plan.paired for plan in self.plans)

    @property
    def converged(self) -> bool:
        """Whether each radius reached the accuracy, or the number of samples, that was asked for."""
        return set(self.stopped) <= {"accuracy", "samples"}

    @property
    def relative_radii(self) -> FloatArray:
        """The Euclidean distances (R,) as shares of the length of w."""
        return self.radii * (self.reach / self.norm)

    @property
    def rms(self) -> FloatArray:
        """The Euclidean distances (R,) per parameter, |w' - w| / sqrt(P)."""
        return np.asarray(self.radii * (self.reach / np.sqrt(self.num_params)))

    def of(self, strata: str | Iterable[str]) -> "SphereFlatness":
        """Return the same measurement on some of the strata, such as the source domains.

        Args:
            strata: their names.

        Raises:
            UserError: if a name is unknown, or none is given.
        """
        asked = [strata] if isinstance(strata, str) else list(strata)
        names = tuple(dict.fromkeys(choose("stratum", name, self.strata) for name in asked))
        if not names:
            raise UserError(f"No stratum was named; there are {', '.join(self.strata)}.")
        rows = [self.strata.index(name) for name in names]
        visits = tuple(rises[:, rows] for rises in self.visits)
        return replace(self, visits=visits, base_loss=self.base_loss[rows], strata=names)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw F over the radius, with its 95 % interval over directions as a band."""
        axes = super().plot(ax)
        axes.set_xlabel("radius γ (L2)" if self.normalisation == "none" else "relative radius ρ")
        axes.set_ylabel("rise of the loss (nats)")
        return axes


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
    report: Report | None = None,
) -> SphereFlatness:
    """Measure F_gamma(w), the mean rise of the loss on spheres around w (arXiv 2410.06020, Eq. 5).

    Ask for an accuracy, and a pilot chooses how: small blocks of images for each direction, in rounds over all images,
    with or without antithetic pairs. Or ask for `num_samples`, and each of so many rays meets every radius and all the
    images: the crossed design of SWAD's script. On a quadratic loss with Hessian H, F = gamma^2 tr(H) / (2 P).

    Args:
        landscape: the loss around w.
        radii: (R,) distances gamma, relative radii rho with a normalisation, or "auto": six that span F = 0.01 to 2.
        num_samples: K rays, each on all images, instead of an accuracy.
        rel_error: standard error / |F| at which sampling stops.
        abs_error: standard error in nats at which it stops anyhow.
        budget: images forwarded at most; 100 passes for each radius by default.
        seed: names the rays; the same for all models that are to be compared.
        normalisation: "filter", "layer" or "parameter" takes the scale of the weights out (Dinh et al. 2017).
        report: called with the walks so far after each unit of visits.
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
    report: Report | None = None,
) -> list[SphereFlatness]:
    """Measure a sampler's landscapes together; the arguments are those of `sphere_flatness`.

    A given `block_size` is sampled in antithetic pairs, and no pilot is flown: a plan that rests on no timing is the
    same on every machine.
    """
    start = time.perf_counter()
    places = radii_of(sampler, radii)
    count = len(sampler.landscapes) * int((places > 0).sum())
    goal = goal_of(sampler.landscapes[0], count, num_samples, errors, budget)
    if block_size and num_samples is None:
        size = block_size if block_size < sampler.landscapes[0].num_samples else 0
        plans = [Plan(float(radius), size, paired=True) for radius in places[places > 0]]
    else:
        plans = plans_of(sampler, places, goal)
    walks = sampler.run(plans, goal, report=report)
    seconds = time.perf_counter() - start
    return [assemble(sampler, which, places, walks, seconds) for which in range(len(sampler.landscapes))]


def goal_of(
    landscape: Landscape, count: int, num_samples: int | None, errors: tuple[float, float], budget: float | None
) -> Goal:
    """Return when to stop.

    Args:
        landscape: one of those that are measured.
        count: landscapes times radii.
        num_samples: so many rays, each on all images; else
        errors: rel_error and abs_error.
        budget: images forwarded at most.

    Raises:
        UserError: where a number does not do.
    """
    if num_samples is not None:
        if num_samples < 2:
            raise UserError(f"num_samples must be at least 2, since an interval needs a spread, but is {num_samples}.")
        return Goal(visits=num_samples)
    if not (min(errors) >= 0 and max(errors) > 0):
        raise UserError(f"rel_error and abs_error must not be negative, nor both zero, but are {errors}.")
    if budget is not None and not budget > 0:
        raise UserError(f"The budget must be a positive number of images, but is {budget}.")
    return Goal(*errors, BUDGET * landscape.num_samples * count if budget is None else budget)


def plans_of(sampler: Sampler, radii: FloatArray, goal: Goal) -> list[Plan]:
    """Return how each radius above zero is sampled. A kept plan is not made again: it rests on timings.

    Args:
        sampler: of the measurement.
        radii: all of them.
        goal: when sampling stops.

    Raises:
        UserError: where the budget does not reach beyond the pilot.
    """
    above, samples = radii[radii > 0], sampler.landscapes[0].num_samples
    if goal.visits or not len(above) or samples < pilot.FEWEST:
        return [Plan(float(radius), 0, visits=goal.visits or 0) for radius in above]
    sampler.spent += pilot.price(sampler.landscapes, len(above), seed=sampler.seed)
    if goal.budget <= sampler.spent:
        raise UserError(
            f"A pilot at {len(above)} radii forwards {sampler.spent:,.0f} images, more than the budget of"
            f" {goal.budget:,.0f}: give a larger one, or num_samples, which needs no pilot."
        )

    def make() -> FloatArray:
        flown = pilot.fly(
            sampler.landscapes, above, seed=sampler.seed, normalisation=sampler.normalisation, value=sampler.value
        )
        plans = pilot.plan(flown, above, goal, samples)
        return np.array([[plan.radius, plan.block_size, plan.paired, plan.visits] for plan in plans])

    kept = next(iter(sampler.keep([("plan", make)])))
    return [Plan(float(r), int(size), bool(paired), int(visits)) for r, size, paired, visits in kept]


def radii_of(sampler: Sampler, radii: npt.ArrayLike | str) -> FloatArray:
    """Return the radii as an array; "auto" asks a small pilot where F is 0.01 and 2, and spans that.

    Args:
        sampler: of the measurement.
        radii: numbers, or "auto".

    Raises:
        UserError: where a radius is negative or not finite, or the word is another.
    """
    if isinstance(radii, str):
        if radii != "auto":
            raise UserError(f'radii must be numbers or "auto", but are {radii!r}.')
        sampler.spent += pilot.span_price(sampler)
        return next(iter(sampler.keep([("radii", lambda: pilot.span(sampler))])))
    places = np.atleast_1d(np.asarray(radii, dtype=np.float64))
    if places.ndim != 1 or not places.size or not np.isfinite(places).all() or (places < 0).any():
        raise UserError(f"The radii must be finite numbers of at least 0, one or more, but {radii} came.")
    return places


def assemble(sampler: Sampler, which: int, radii: FloatArray, walks: Sequence[Walk], seconds: float) -> SphereFlatness:
    """Return what one of the landscapes' walks say, and its share of the cost; radius 0 is 0, and was not sampled."""
    landscape, spent = sampler.landscapes[which], sampler.spent / len(sampler.landscapes)
    by_radius = {walk.plan.radius: walk for walk in walks}
    longest = max((walk.visits.shape[1] for walk in walks), default=2)
    still = Walk(Plan(0.0, 0), 1, np.zeros((len(sampler.landscapes), longest, len(landscape.strata))), "samples")
    each = [by_radius.get(float(radius), still) for radius in radii]
    return SphereFlatness(
        radii=radii,
        visits=tuple(walk.visits[which] for walk in each),
        plans=tuple(walk.plan for walk in each),
        blocks=tuple(walk.blocks for walk in each),
        stopped=tuple(walk.stopped for walk in each),
        cost=Cost(spent / landscape.num_samples, int(spent), 0, seconds / len(sampler.landscapes)),
        strata=landscape.strata,
        base_loss=landscape.base_loss,
        normalisation=sampler.normalisation,
        seed=sampler.seed,
        num_params=landscape.num_params,
        norm=landscape.norm,
        reach=reach(landscape, sampler.normalisation),
    )
