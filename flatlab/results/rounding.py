"""Rise of the loss under a perturbation, compared with random ones of the same norm."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray, Normalisation
from flatlab.results.estimate import Cost, Estimate, Sampled, axes_of, mean_of, rows_of, standing
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundingRise(Sampled):
    """The rise of the loss by perturbations, and its mean over random ones of the same norm, in nats.

    Attributes:
        names: (R,) of the perturbations.
        norms: (R,) their Euclidean lengths, each of which is an equivalent radius gamma.
        rises: (R, S) of the strata's mean losses at w + e.
        reverses: (R, S) at w - e: the mean of both is free of the slope at w.
        visits: for each perturbation the rises (K, S) along random ones of its norm.
        strata: names (S,); they weigh equally in `value`.
        normalisation: where a random one has the norm of the perturbation: "none" (on the whole), "layer",
            "filter" or "parameter".
        num_params: P, the dimension of the space of the perturbations.
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

    def of(self, strata: str | Iterable[str]) -> Self:
        """Return the same rises on some of the strata, such as the source domains.

        Args:
            strata: their names.

        Raises:
            UserError: if a name is unknown, or none is given.
        """
        rows = rows_of(strata, self.strata)
        visits = tuple(draws[:, rows] for draws in self.visits)
        names = tuple(self.strata[row] for row in rows)
        return replace(self, strata=names, visits=visits, rises=self.rises[:, rows], reverses=self.reverses[:, rows])

    @property
    def estimates(self) -> list[Estimate]:
        """Mean rise along the random perturbations that belong to each."""
        return [mean_of(draws.mean(axis=1)) for draws in self.visits]

    @property
    def raw(self) -> list[FloatArray]:
        """The rises along the random perturbations."""
        return list(self.visits)

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The lengths."""
        return "radius", self.norms

    @property
    def z(self) -> FloatArray:
        """(R,) how many standard deviations of the random rises a perturbation's rise lies above their mean."""
        return np.array([standing(own.mean(), draws.mean(axis=1))[0] for own, draws in self._pairs()])

    @property
    def rank(self) -> FloatArray:
        """(R,) the share of random rises that are smaller, (1 + how many) / (K + 2): 0.5 is typical."""
        return np.array([standing(own.mean(), draws.mean(axis=1))[1] for own, draws in self._pairs()])

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each perturbation; `value` is the random mean, `rise` its own."""
        own = {"rise": self.rises.mean(axis=1), "reverse": self.reverses.mean(axis=1), "z": self.z, "rank": self.rank}
        return super().to_frame().assign(name=self.names, **own)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the random mean over the radius with its 95 % interval, and the perturbations' own rises as points."""
        axes = super().plot(ax)
        axes.plot(self.norms, self.rises.mean(axis=1), "o")
        axes.set(xlabel="radius γ (L2)", ylabel="rise of the loss (nats)")
        return axes

    def _pairs(self) -> Iterator[tuple[FloatArray, FloatArray]]:
        return zip(self.rises, self.visits, strict=True)


def cost_of(perturbations: int, num_samples: int, images: int) -> Cost:
    """Return the cost of perturbations on all images: one pass at w; two, and K random ones, for each."""
    passes = 1 + perturbations * (2 + num_samples)
    return Cost(passes, passes * images)


WHOLE = "all"  # the part that is the whole network


@dataclass(frozen=True, eq=False)
class RoundingRises(Saved):
    """The rises by rounding a network, and each of its layers alone.

    Attributes:
        parts: (part, normalisation of the random perturbations) -> the rises, by bit width; "all" is the whole network.
        images: N, on which each rise is measured.
    """

    parts: dict[tuple[str, Normalisation], RoundingRise]
    images: int

    def of(self, strata: str | Iterable[str]) -> Self:
        """Return the same rises on some of the strata, as `RoundingRise.of`."""
        chosen = [strata] if isinstance(strata, str) else list(strata)
        return replace(self, parts={key: found.of(chosen) for key, found in self.parts.items()})

    @property
    def strata(self) -> tuple[str, ...]:
        """Names (S,) of the strata."""
        return self._first.strata

    @property
    def norm(self) -> float:
        """Euclidean length of the weights that are rounded."""
        return self._first.norm

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each part, normalisation and bit width, as `RoundingRise.to_frame`."""
        import pandas as pd

        frames = [found.to_frame().assign(part=part, normalisation=null) for (part, null), found in self.parts.items()]
        return pd.concat(frames, ignore_index=True)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the rises of the whole network beside random ones under each normalisation, as `RoundingRise.plot`."""
        axes = axes_of(ax)
        for (part, _), found in self.parts.items():
            if part == WHOLE:
                found.plot(axes)
        return axes

    @property
    def _first(self) -> RoundingRise:
        return next(iter(self.parts.values()))

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON; without the seconds."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        rows: list[dict[str, Any]] = []
        for (part, null), found in self.parts.items():
            for index, name in enumerate(found.names):
                numbers = found.rises[index], found.reverses[index], found.visits[index]
                arrays |= dict(zip(_names(len(rows)), numbers, strict=True))
                rows.append({"part": part, "perturbation": name, "null": null, "norm": float(found.norms[index])})
        facts = {"strata": list(self.strata), "num_params": self._first.num_params, "norm": self.norm}
        return arrays, {"rows": rows, **facts, "images": self.images}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns; other facts are ignored."""
        parts: dict[tuple[str, Normalisation], RoundingRise] = {}
        for key, members in groupby(enumerate(facts["rows"]), lambda row: (row[1]["part"], row[1]["null"])):
            rows = list(members)
            rises, reverses, visits = zip(*([arrays[name] for name in _names(at)] for at, _ in rows), strict=True)
            parts[key] = RoundingRise(
                names=tuple(row["perturbation"] for _, row in rows),
                norms=np.array([row["norm"] for _, row in rows]),
                rises=np.array(rises),
                reverses=np.array(reverses),
                visits=visits,
                strata=tuple(facts["strata"]),
                normalisation=key[1],
                num_params=facts["num_params"],
                norm=facts["norm"],
                cost=cost_of(len(rows), len(visits[0]), facts["images"]),
            )
        return cls(parts, facts["images"])


def _names(index: int) -> tuple[str, str, str]:
    """Return the names of three arrays: rises and reverses of one perturbation, and the random rises."""
    return f"own-{index:04d}", f"reverse-{index:04d}", f"twins-{index:04d}"
