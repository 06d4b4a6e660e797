"""What a perturbation does to the loss, beside random ones of the same length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flatlab.results.estimate import Estimate, FloatArray, Sampled, mean_of, standing
from flatlab.results.sphere import Normalisation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundingRise(Sampled):
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
