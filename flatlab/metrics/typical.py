"""Is a perturbation a typical direction? The rise of the loss that it causes, beside that of random twins.

Twins share its length on the whole ("none"), in each layer, in each filter, or number by number, as rays of spheres do.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import whole
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.losses import wide
from flatlab.metrics.rays import Normalisation, check_normalisation
from flatlab.metrics.results import Cost, Estimate, FloatArray, Sampled, mean_of, standing
from flatlab.metrics.sampling import Goal, Keep, Plan, Sampler, Unit, forget
from flatlab.seeds import base_seed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, kw_only=True)
class TypicalRise(Sampled):
    """The mean rise of the loss over random twins of perturbations, and the perturbations' own, in nats.

    Attributes:
        names: (R,) of the perturbations.
        norms: (R,) their Euclidean lengths, each of which is an equivalent radius gamma.
        rises: (R, S) of the strata's mean losses at w + e.
        reverses: (R, S) at w - e: the mean of both is free of the slope at w.
        visits: for each perturbation the rises (K, S) along its twins.
        strata: names (S,); they weigh equally in `value`.
        normalisation: where a twin is as long as the perturbation: "none" (on the whole), "layer", "filter" or
            "parameter".
        num_params: P, the dimension of the space that is moved in.
        norm: Euclidean length of w.
    """

    names: tuple[str, ...]
    norms: FloatArray
    rises: FloatArray
    reverses: FloatArray
    visits: tuple[FloatArray, ...]
    strata: tuple[str, ...]
    normalisation: Normalisation
    num_params: int
    norm: float

    @property
    def estimates(self) -> list[Estimate]:
        """Mean rise along the twins of each perturbation."""
        return [mean_of(draws.mean(axis=1)) for draws in self.visits]

    @property
    def raw(self) -> list[FloatArray]:
        """The twins' rises."""
        return list(self.visits)

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The lengths."""
        return "radius", self.norms

    @property
    def z(self) -> FloatArray:
        """(R,) how many of the twins' standard deviations a perturbation's rise lies above their mean."""
        return np.array([standing(own.mean(), draws.mean(axis=1))[0] for own, draws in self._pairs()])

    @property
    def rank(self) -> FloatArray:
        """(R,) the share of twins that rise less, (1 + how many) / (K + 2): 0.5 is typical."""
        return np.array([standing(own.mean(), draws.mean(axis=1))[1] for own, draws in self._pairs()])

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each perturbation; `value` is the twins' mean, `rise` its own."""
        own = {"rise": self.rises.mean(axis=1), "reverse": self.reverses.mean(axis=1), "z": self.z, "rank": self.rank}
        return super().to_frame().assign(name=self.names, **own)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the twins' mean over the radius with its 95 % interval, and the perturbations' own rises as points."""
        axes = super().plot(ax)
        axes.plot(self.norms, self.rises.mean(axis=1), "o")
        axes.set(xlabel="radius γ (L2)", ylabel="rise of the loss (nats)")
        return axes

    def _pairs(self) -> Iterator[tuple[FloatArray, FloatArray]]:
        return zip(self.rises, self.visits, strict=True)


def typical_rise(
    landscape: Landscape,
    perturbations: Mapping[str, Tensor],
    *,
    normalisation: Normalisation = "none",
    num_samples: int = 100,
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
) -> TypicalRise:
    """Measure how far the loss rises at w + e, and on random twins of e, each on all the data.

    Args:
        landscape: the loss around w.
        perturbations: vectors e (P,) by name.
        normalisation: where a twin is as long as e: "none" (on the whole), or in each layer, filter or parameter.
        num_samples: K twins of each perturbation.
        seed: names the rays; twins of equal number are one ray, scaled.
        keep: keeps units, which makes the measurement resumable.

    Raises:
        UserError: where a perturbation is not a point of the landscape, not finite or zero, or K is below 2.
    """
    whole("num_samples", num_samples, least=2)
    if not perturbations:
        raise UserError("perturbations must be a mapping from names to vectors, with one at least, got none.")
    start = time.perf_counter()
    sampler = Sampler([landscape], base_seed(seed), check_normalisation(normalisation, landscape), keep=keep)
    vectors = {name: _checked(name, landscape.as_point(each)) for name, each in perturbations.items()}
    own = [_own(landscape, name, vector, keep) for name, vector in vectors.items()]
    visits = [_visits(sampler, name, vector, num_samples) for name, vector in vectors.items()]
    passes = 1 + len(vectors) * (2 + num_samples)
    return TypicalRise(
        names=tuple(vectors),
        norms=np.array([_length(each) for each in vectors.values()]),
        rises=np.array([rises[0] for rises in own]),
        reverses=np.array([rises[1] for rises in own]),
        visits=tuple(visits),
        strata=landscape.strata,
        normalisation=sampler.normalisation,
        num_params=landscape.num_params,
        norm=landscape.norm,
        cost=Cost(passes, passes * landscape.num_samples, 0, time.perf_counter() - start),
    )


def _checked(name: str, vector: Tensor) -> Tensor:
    length = _length(vector)
    if not (np.isfinite(length) and length > 0):
        raise UserError(f"The perturbation {name!r} must be finite and not zero, but its length is {length}.")
    return vector


def _length(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=wide(vector)))


def _own(landscape: Landscape, name: str, vector: Tensor, keep: Keep) -> FloatArray:
    """Return the rises (2, S) at w + e and at w - e."""

    def compute() -> FloatArray:
        with landscape.moving() as at:
            return np.asarray(at(vector, [1.0, -1.0]) - landscape.base_loss)

    return next(iter(keep([(f"own-{name}", compute)])))


def _visits(sampler: Sampler, name: str, vector: Tensor, num_samples: int) -> FloatArray:
    """Return the rises (K, S) along the twins of one perturbation: a sphere of radius 1, in its lengths."""

    def keep(units: Sequence[Unit]) -> Iterator[FloatArray]:
        return sampler.keep([(f"{sampler.normalisation}-{name}-{unit}", compute) for unit, compute in units])

    (walk,) = replace(sampler, like=vector, keep=keep).run([Plan(1.0, 0, visits=num_samples)], Goal(visits=num_samples))
    if walk.stopped == "interrupted":
        raise KeyboardInterrupt  # what is kept is whole: the next call goes on from it
    rises: FloatArray = walk.visits[0]
    return rises
