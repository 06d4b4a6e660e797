"""Flatness on spheres: the rise of the loss at each radius, of one checkpoint or as a difference of two."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray, Normalisation
from flatlab.errors import UserError
from flatlab.results.estimate import MISSED, Cost, Estimate, Sampled, Stopped, Stored, axes_of, estimate, rows_of
from flatlab.results.verdicts import missed, remarks, verdict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LISTS = ("strata", "blocks", "stopped", "notes", "rises")  # facts of a file, under the fields' names
PLAIN = ("num_params", "norm", "reach", "chance", "normalisation", "seed")


@dataclass(frozen=True)
class SamplingPlan:
    """How one radius is sampled."""

    radius: float
    block_size: int  # images of each draw; 0: all of them, the crossed design
    paired: bool = False  # each direction with its antithesis, in the same block
    visits: int = 0  # draws that the pilot foresees
    between: float = 0.0  # share of the draws' variance that lies between images, by the pilot; 0: unknown


@dataclass(frozen=True, eq=False, kw_only=True)
class SphereFlatness(Stopped):
    """F_gamma(w) = E L(w + gamma u) - L(w) over unit vectors u, in nats (arXiv 2410.06020, Eq. 5).

    Attributes:
        radii: (R,) Euclidean distances; with another normalisation than "none" relative radii rho.
        visits: for each radius, rises (J, S) of the strata's mean losses, one row for each draw of a direction
            and a block of images; draw j uses block j mod B.
        plans: for each radius, how it was sampled: block size, pairs, and the draws foreseen.
        blocks: (R,) how many blocks B the images were cut into; 1 is the crossed design, each direction on all images.
        stopped: for each radius "samples", "accuracy", "budget", "nonfinite" (a rise is infinite or NaN, and so is
            F) or "interrupted".
        strata: names (S,) of the strata; they weigh equally in `value`.
        base_loss: (S,) mean loss at w.
        normalisation: "none": w + gamma u; else w + rho z where z has the norm of w in each filter, layer or parameter.
        seed: of the directions and the blocks; equal seeds give equal directions on one kind of device.
        num_params: P, the dimension of the sphere's space.
        norm: Euclidean length of w.
        reach: Euclidean distance at radius 1: one, or the norm of the weights that are scaled.
        slopes: (K, S, S) products of the strata's slopes along directions (`slope.slopes`); None if the budget was
            too small.
        notes: what was found on opening the landscape, such as parameters that do not change the loss.
        device: kind of device on which the directions were drawn, "cpu" or "cuda".
        chance: the loss of a uniform guess, ln C of C classes, in nats; None where it is unknown.
        rises: (R,) the rises in nats that the radii were chosen for; empty where the radii were given.
    """

    radii: FloatArray
    visits: tuple[FloatArray, ...]
    plans: tuple[SamplingPlan, ...]
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
    chance: float | None = None
    device: str = "cpu"
    rises: tuple[float, ...] = ()

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a file: arrays, and facts for JSON; without the seconds."""
        arrays = {_visits(index): rises for index, rises in enumerate(self.visits)}
        arrays |= {"radii": self.radii, "base_loss": self.base_loss}
        arrays |= {} if self.slopes is None else {"slopes": self.slopes}
        facts: dict[str, Any] = {name: list(getattr(self, name)) for name in LISTS}
        facts |= {name: getattr(self, name) for name in PLAIN}
        facts |= {"plans": [asdict(plan) for plan in self.plans]}
        facts |= {"images": self.cost.images, "forward_passes": self.cost.forward_passes}
        facts |= {} if self.device == "cpu" else {"device": self.device}  # older files have no device
        return arrays, facts

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from the output of `to_arrays`; passes that an older file lacks are NaN."""
        known: dict[str, Any] = {name: tuple(facts.get(name, ())) for name in LISTS}
        known |= {name: facts[name] for name in PLAIN}
        known |= {"device": facts.get("device", "cpu")}
        return cls(
            radii=arrays["radii"],
            visits=tuple(arrays[_visits(index)] for index in range(len(arrays["radii"]))),
            base_loss=arrays["base_loss"],
            slopes=arrays.get("slopes"),
            plans=tuple(SamplingPlan(**plan) for plan in facts["plans"]),
            cost=Cost(facts.get("forward_passes", np.nan), facts["images"]),
            **known,
        )

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
        """Rises (K, R, S) of the crossed design: directions, radii, strata.

        Raises:
            UserError: where radii were sampled in blocks, each by its own plan: see `visits`.
        """
        if set(self.blocks) != {1} or len({len(rises) for rises in self.visits}) > 1:
            raise UserError("Only the crossed design (num_samples=...) has an array of samples; see `visits`.")
        stacked: FloatArray = np.stack(self.visits, axis=1)
        return stacked

    @property
    def paired(self) -> tuple[bool, ...]:
        """For each radius, whether each direction was evaluated with its negative."""
        return tuple(plan.paired for plan in self.plans)

    @property
    def distances(self) -> FloatArray:
        """The Euclidean distances (R,) at the radii."""
        return self.radii * self.reach

    @property
    def relative_radii(self) -> FloatArray:
        """The distances (R,) as shares of the length of w; infinite where w is zero."""
        if not self.norm:
            return np.where(self.distances > 0, np.inf, 0.0)
        return self.distances / self.norm

    @property
    def rms(self) -> FloatArray:
        """The distances (R,) per parameter, |w' - w| / sqrt(P)."""
        return np.asarray(self.distances / np.sqrt(self.num_params))

    @property
    def guessing(self) -> npt.NDArray[np.bool_]:
        """Mask (R,) of the radii where the loss reaches chance level or is not finite; False if `chance` is None."""
        if self.chance is None:
            return np.zeros(len(self.radii), dtype=bool)
        means = np.array([rises.mean(axis=1).mean() for rises in self.visits])
        return np.asarray(~(self.base_loss.mean() + means < self.chance))

    def of(self, strata: str | Iterable[str]) -> "SphereFlatness":
        """Return the same measurement on some of the strata, such as the source domains.

        Args:
            strata: their names.

        Raises:
            UserError: if a name is unknown, or none is given.
        """
        rows = rows_of(strata, self.strata)
        names = tuple(self.strata[row] for row in rows)
        visits = tuple(rises[:, rows] for rises in self.visits)
        slopes = None if self.slopes is None else self.slopes[:, rows][:, :, rows]
        plans = tuple(replace(plan, between=0.0) for plan in self.plans)  # which is of all strata
        return replace(self, visits=visits, plans=plans, base_loss=self.base_loss[rows], strata=names, slopes=slopes)

    @property
    def remarks(self) -> list[str]:
        """Sentences on the landscape, non-finite losses, missed accuracy and the slope at w."""
        slopes = None if self.slopes is None else self.slopes.mean(axis=(1, 2))
        found = remarks(self.radii, [rises.mean(axis=1) for rises in self.visits], slopes)
        if self.guessing.any():
            where = f"({self.chance:.2f} nats) at radius {self.radii[self.guessing][0]:g}"
            found.append(f"The loss reaches chance level {where}: no verdict from there on.")
        return [*self.notes, *found, *missed(self.radii, self.stopped, self.stderr)]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw F over the radius, with its 95 % interval over directions as a band."""
        axes = super().plot(ax)
        axes.set(**dict(zip(("xlabel", "ylabel"), self.axis_names, strict=True)))
        return axes

    @property
    def axis_names(self) -> tuple[str, str]:
        """Names of the axes of a picture: what a radius is, and F."""
        return "radius γ (L2)" if self.normalisation == "none" else "relative radius ρ", "rise of the loss (nats)"

    def interactive(self, name: str = "F") -> Any:
        """Return F over the radius with its 95 % interval, as an interactive picture (plotly; extra `report`).

        Args:
            name: of the curve.

        Raises:
            UserError: where plotly is not installed.
        """
        from flatlab.plots import bands

        return bands({name: (self.radii, self.value, *self.interval())}, axes=self.axis_names)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reach(Stored):
    """The radii at which the mean loss of some strata rises by given amounts.

    Attributes:
        radii: (R,) Euclidean distances; with another normalisation than "none" relative radii.
        rises: (R,) in nats.
        strata: names of the strata; they weigh equally.
        images: upper bound of the number of images forwarded.
    """

    radii: FloatArray
    rises: tuple[float, ...]
    strata: tuple[str, ...]
    images: int

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each rise."""
        import pandas as pd

        return pd.DataFrame({"radius": self.radii, "rise": self.rises})

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the rises over the radii, both on logarithmic axes."""
        axes = axes_of(ax)
        axes.loglog(self.radii, self.rises, "o-")
        axes.set(xlabel="radius", ylabel="rise of the loss (nats)")
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedDifference(Sampled):
    """F of one model less F of another, paired by draw: variation that both share cancels.

    Attributes:
        radii: (R,) as in the two measurements.
        a: the first measurement.
        b: the second, along the same directions.
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
        """The differences (J,) at each radius, the mean over the strata, of the draws that both have made."""
        pairs = [(*each, min(map(len, each))) for each in zip(self.a.visits, self.b.visits, strict=True)]
        return [(a[:common] - b[:common]).mean(axis=1) for a, b, common in pairs]

    @property
    def estimates(self) -> list[Estimate]:
        """Mean difference at each radius; where the two were sampled by different plans, of independent estimates."""
        paired = [estimate(draws, blocks) for draws, blocks in zip(self.raw, self.a.blocks, strict=True)]
        alone = zip(self.a.estimates, self.b.estimates, strict=True)
        return [one if same else _less(*two) for same, one, two in zip(self.alike, paired, alone, strict=True)]

    @property
    def alike(self) -> list[bool]:
        """Whether both were sampled by one plan at each radius, so that draws have directions and images in common."""
        sizes = [[plan.block_size for plan in each.plans] for each in (self.a, self.b)]
        both = zip(*sizes, self.a.paired, self.b.paired, self.a.blocks, self.b.blocks, strict=True)
        return [each[::2] == each[1::2] for each in both]

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """Mask (R,) of the radii at which a verdict is given: those below which neither loss reaches chance level."""
        return np.asarray(~np.logical_or.accumulate(self.a.guessing | self.b.guessing))

    @property
    def converged(self) -> bool:
        """Whether both measurements are, at all radii."""
        return all(self.reached)

    @property
    def reached(self) -> list[bool]:
        """Whether both measurements are as accurate as requested, at each radius."""
        return [a and b for a, b in zip(self.a.reached, self.b.reached, strict=True)]

    @property
    def remarks(self) -> list[str]:
        """Sentences on the radii at which the requested accuracy is not reached; often none."""
        stopped = [one if one in MISSED else two for one, two in zip(self.a.stopped, self.b.stopped, strict=True)]
        return missed(self.radii, stopped, self.stderr)

    def ratio(self, level: float = 0.95) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return F_a / F_b at each radius with its interval (value, low, high), by the delta method.

        Where F_b does not differ significantly from zero, the ratio is undefined, and all three are NaN.
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
        """Return a sentence on which of the two checkpoints is flatter on these images, and up to which radius.

        The level is that of the sentence as a whole, by Holm's method over the radii: it names one of two checkpoints
        that are equally flat with a probability of 1 - level at most, however many radii there are.
        """
        found = [each for each, read in zip(self.estimates, self.read, strict=True) if read]
        return verdict(found, self.radii[self.read], (a, b), level=level)


def _visits(index: int) -> str:
    """Return the name of an array: the visits of a radius."""
    return f"visits-{index:02d}"


def _less(a: Estimate, b: Estimate) -> Estimate:
    """Return the difference of two independent estimates."""
    return Estimate(a.value - b.value, float(np.hypot(a.stderr, b.stderr)), min(a.freedom, b.freedom))
