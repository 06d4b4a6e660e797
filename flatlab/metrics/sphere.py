"""Flatness on a sphere: how far the loss rises at distance gamma from a minimum, in a random direction."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from flatlab.arguments import whole
from flatlab.errors import UserError, choose
from flatlab.landscape import Landscape
from flatlab.metrics import planning
from flatlab.metrics.rays import Normalisation, check_normalisation, reach
from flatlab.metrics.results import Cost, Estimate, FloatArray, Stopped
from flatlab.metrics.rounds import estimate
from flatlab.metrics.sampling import Plan, Report, Sampler, Walk
from flatlab.metrics.sentences import missed, remarks
from flatlab.seeds import base_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, kw_only=True)
class SphereFlatness(Stopped):
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
        slopes: (K, S, S) products of the strata's slopes along rays (`slope.slopes`); None where the budget did not
            reach so far.
        notes: what was found on opening the landscape, such as parameters that do not move the loss.
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
    slopes: FloatArray | None = None
    notes: tuple[str, ...] = ()

    @property
    def estimates(self) -> list[Estimate]:
        """Mean rise at each radius, with its standard error over directions (and images, where these were sampled)."""
        return [
            estimate(rises.mean(axis=1), blocks, plan.between)
            for rises, blocks, plan in zip(self.visits, self.blocks, self.plans, strict=True)
        ]

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
    def relative_radii(self) -> FloatArray:
        """The Euclidean distances (R,) as shares of the length of w; infinite where w is zero."""
        if not self.norm:
            return np.where(self.radii * self.reach > 0, np.inf, 0.0)
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
        slopes = None if self.slopes is None else self.slopes[:, rows][:, :, rows]
        plans = tuple(replace(plan, between=0.0) for plan in self.plans)  # which speaks of all the strata
        return replace(self, visits=visits, plans=plans, base_loss=self.base_loss[rows], strata=names, slopes=slopes)

    @property
    def remarks(self) -> list[str]:
        """Sentences on the landscape, on what is not finite or not as accurate as asked, and on the slope at w."""
        slopes = None if self.slopes is None else self.slopes.mean(axis=(1, 2))
        found = remarks(self.radii, [rises.mean(axis=1) for rises in self.visits], slopes)
        return [*self.notes, *found, *missed(self.radii, self.stopped, self.stderr)]

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
    places = planning.radii_of(sampler, radii)
    above = planning.above_zero(places)
    count = len(sampler.landscapes) * len(above)
    goal = planning.goal_of(sampler.landscapes[0], count, num_samples, errors, budget)
    if block_size is not None and whole("block_size", block_size) and num_samples is None:
        size = block_size if block_size < sampler.landscapes[0].num_samples else 0
        plans = [Plan(float(radius), size, paired=True) for radius in above]
    else:
        plans = planning.plans_of(sampler, places, goal)
    tilts = planning.slopes_of(sampler, plans, goal)
    walks = sampler.run(plans, goal, report=report)
    seconds = time.perf_counter() - start
    return [replace(assemble(sampler, which, places, walks, seconds), slopes=tilt) for which, tilt in enumerate(tilts)]


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
        notes=landscape.remarks,
    )
