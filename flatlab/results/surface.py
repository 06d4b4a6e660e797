"""Losses on a line or a plane through a landscape: values at true coordinates."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.errors import choose
from flatlab.results.estimate import Cost, Estimate, Sampled, Stored, axes_of, mean_of, rows_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

AXIS = {"loss": "loss (nats)", "accuracy": "accuracy"}


class Timed(Stored):
    """Base class of results that are stored with their cost, without the seconds."""

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON; without the seconds."""
        arrays, facts = super().to_arrays()
        return arrays, {**facts, "cost": asdict(replace(facts["cost"], seconds=0.0))}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns; other facts are ignored."""
        return super().from_arrays(arrays, {**facts, "cost": Cost(**facts["cost"])})


class Grid(Timed):
    """What profiles and surfaces share: metrics and strata by name."""

    values: FloatArray
    metrics: tuple[str, ...]
    strata: tuple[str, ...]

    def of(self, metric: str = "loss", strata: str | Iterable[str] | None = None) -> FloatArray:
        """Return one metric, averaged over all strata or some; not finite where one of them is not.

        Raises:
            UserError: where a name is unknown.
        """
        column = self.metrics.index(choose("metric", metric, self.metrics))
        rows = rows_of(self.strata if strata is None else strata, self.strata)
        with np.errstate(invalid="ignore"):
            return np.asarray(self.values[..., rows, column].mean(axis=-1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Profile(Grid, Sampled):
    """A landscape along lines through its point: one line for each of D directions.

    Attributes:
        places: (G,) coordinates along each direction, in its units.
        values: (D, G, S, M) directions, places, strata, metrics.
        strata: (S,) names; they weigh equally.
        metrics: (M,) names.
        labels: (D,) name of each direction.
        seed: of random directions.
    """

    places: FloatArray
    values: FloatArray
    strata: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    seed: int

    @property
    def estimates(self) -> list[Estimate]:
        """Mean loss over the directions at each place."""
        return [mean_of(draws) for draws in self.raw]

    @property
    def raw(self) -> list[FloatArray]:
        """The losses (D,) at each place."""
        return list(self.of().T)

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The places."""
        return "coordinate", self.places

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table: a row for each direction, place, stratum and metric."""
        axes = {"direction": np.arange(len(self.labels)), "coordinate": self.places}
        return _tidy(self, axes)

    def plot(self, ax: "Axes | None" = None, *, metric: str = "loss") -> "Axes":
        """Draw each line thinly, and over them the mean with its 95 % band over the directions."""
        axes = axes_of(ax)
        lines = self.of(metric)
        found = [mean_of(draws) for draws in lines.T]
        mean, half = np.array([each.value for each in found]), np.array([each.half_width() for each in found])
        if len(lines) > 1:
            axes.plot(self.places, lines.T, color="0.75", lw=0.6)
            axes.fill_between(self.places, mean - half, mean + half, alpha=0.25, color="C0", lw=0)
        axes.plot(self.places, mean, color="C0")
        label = self.labels[0] if len(lines) == 1 else f"{len(lines)} directions: {_unit(self.labels[0])}"
        axes.set(xlabel=label, ylabel=AXIS.get(metric, metric))
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Surface(Grid):
    """A landscape on a plane through its point.

    Attributes:
        x, y: (G1,), (G2,) coordinates along the two directions, in their units; `values[i, j]` is at (x[i], y[j]).
        values: (G1, G2, S, M) places, strata, metrics; not finite where they are not.
        measured: (G1, G2) which places were evaluated; the others, where refinement found the surface straight, are
            interpolated linearly.
        strata: (S,) names; they weigh equally.
        metrics: (M,) names.
        labels: (2,) what the axes are.
        marks: (K, 2) coordinates of points of interest.
        mark_labels: (K,) their names.
        distances: (K,) how far they lie from the plane.
        explained: (2,) share of a trajectory's variance along the axes, or NaN.
        connected: whether the marks are a path.
        cosine: of the two directions.
        seed: of random directions.
        cost: forward passes.
        statistics: "own", those of the network in the origin everywhere, or "recomputed": BatchNorm's, at each place.
    """

    x: FloatArray
    y: FloatArray
    values: FloatArray
    measured: npt.NDArray[np.bool_]
    strata: tuple[str, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    marks: FloatArray
    mark_labels: tuple[str, ...]
    distances: FloatArray
    explained: FloatArray
    connected: bool
    cosine: float
    seed: int
    cost: Cost
    statistics: str = "own"

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table: a row for each place, stratum and metric, and whether it was evaluated."""
        frame = _tidy(self, {"x": self.x, "y": self.y})
        return frame.assign(measured=np.repeat(self.measured.ravel(), len(self.strata) * len(self.metrics)))

    def plot(
        self,
        ax: "Axes | None" = None,
        *,
        metric: str = "loss",
        strata: str | Iterable[str] | None = None,
        levels: npt.ArrayLike | None = None,
        kind: Literal["contour", "relief"] = "contour",
    ) -> "Axes":
        """Draw contours with their levels (logarithmic for a positive loss), or a relief; and the marks.

        Args:
            ax: the axes; 3-D ones for a relief.
            metric: which.
            strata: the mean over which of them.
            levels: of the contours: the same for surfaces that are to be compared.
            kind: contour or relief.
        """
        import matplotlib.pyplot as plt

        from flatlab import plots as draw

        values = self.of(metric, strata)
        chosen = draw.contour_levels([values], log=metric == "loss") if levels is None else np.asarray(levels, float)
        if kind == "relief":
            axes: Any = plt.figure().add_subplot(projection="3d") if ax is None else ax
            draw.relief(axes, (self.x, self.y), values, levels=chosen)
            axes.set_zlabel(AXIS.get(metric, metric))
        else:
            axes = axes_of(ax)
            filled = draw.contours(axes, (self.x, self.y), values, levels=chosen)
            if ax is None:
                axes.figure.colorbar(filled, ax=axes, label=AXIS.get(metric, metric))
            draw.marked(axes, self.marks, self.mark_labels, connected=self.connected)
        names = [label.partition(" (")[0] if kind == "relief" else label for label in self.labels]
        axes.set(xlabel=names[0], ylabel=names[1])
        return axes  # type: ignore[no-any-return]

    def interactive(self, *, metric: str = "loss", strata: str | Iterable[str] | None = None) -> Any:
        """Return the surface as a picture that can be rotated, for a notebook (plotly; extra `report`).

        Args:
            metric: which.
            strata: the mean over which of them.

        Raises:
            UserError: where plotly is not installed.
        """
        from flatlab.plots import turning

        x, y = (label.partition(" (")[0] for label in self.labels)
        return turning(
            (self.x, self.y),
            self.of(metric, strata),
            marks=(self.marks, self.mark_labels),
            connected=self.connected,
            axes=(x, y, AXIS.get(metric, metric)),
        )


def _tidy(grid: Any, axes: dict[str, npt.NDArray[Any]]) -> "pd.DataFrame":
    import pandas as pd

    names = [*axes.values(), grid.strata, grid.metrics]
    index = pd.MultiIndex.from_product(names, names=[*axes, "stratum", "metric"])
    return pd.DataFrame({"value": grid.values.ravel()}, index=index).reset_index()


def _unit(label: str) -> str:
    return label.partition("(")[2].rstrip(")") or label
