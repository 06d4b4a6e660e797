"""The loss along the straight line between two checkpoints, and the barrier on it, as a result; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.results.estimate import Estimate, Sampled, axes_of
from flatlab.results.surface import Timed
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Connection(Timed, Sampled):
    """The loss along the straight line between two checkpoints.

    Attributes:
        places: (T,) from 0, the first checkpoint, to 1, the second.
        length: the Euclidean distance of the two.
        losses: (T, S) mean loss of each stratum, over all images.
        errors: (T,) standard errors, over all images, of the mean loss less the linear interpolation of its ends.
        position: the place of the barrier, chosen on one half of the images.
        excess: (n,) of each image of the other half: its loss there, less the linear interpolation of its losses at
            the ends.
        stratum: (n,) of these images; strata weigh equally.
        bootstrap: (B,) the barrier on images drawn again with replacement, within the strata.
        strata: (S,) names.
        statistics: "interpolated" or "recomputed": BatchNorm's running statistics along the line.
        seed: of the halves and the bootstrap.
    """

    places: FloatArray
    length: float
    losses: FloatArray
    errors: FloatArray
    position: float
    excess: FloatArray
    stratum: npt.NDArray[np.int64]
    bootstrap: FloatArray
    strata: tuple[str, ...]
    statistics: str
    seed: int

    over: ClassVar[str] = "images"

    @property
    def barrier(self) -> float:
        """The height in nats; negative where the loss lies below the interpolation of the ends everywhere."""
        return float(self.value[0])

    @property
    def estimates(self) -> list[Estimate]:
        """The height, with its standard error over images."""
        height = float(by_stratum(self.excess[None], self.stratum).mean())
        with np.errstate(invalid="ignore"):
            return [Estimate(height, float(self.bootstrap.std(ddof=1)), len(self.excess) - 1)]

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Return the percentile interval (low, high), each (1,), of the paired bootstrap over images."""
        self.estimates[0].half_width(level)  # refuses an invalid level
        low, high = np.quantile(self.bootstrap, [(1 - level) / 2, (1 + level) / 2])
        return np.array([low]), np.array([high])

    @property
    def raw(self) -> list[FloatArray]:
        """The excess of each image."""
        return [self.excess]

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The place of the barrier."""
        return "position", np.array([self.position])

    @property
    def height(self) -> FloatArray:
        """The mean loss (T,) over all images, less the linear interpolation of its ends."""
        curve = self.losses.mean(axis=1)
        return np.asarray(curve - chord(curve, self.places))

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table: the loss at each place, and its height over the ends with its 95 % band over images."""
        import pandas as pd

        half = Estimate(0.0, 1.0, len(self.excess) - 1).half_width() * self.errors
        columns = {"place": self.places, "distance": self.length * self.places, "loss": self.losses.mean(axis=1)}
        columns |= {"height": self.height, "low": self.height - half, "high": self.height + half}
        return pd.DataFrame(columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the loss against distance, its band over images (of the height over the ends), and the barrier."""
        axes = axes_of(ax)
        frame, at = self.to_frame(), self.position * self.length
        straight = frame["loss"] - frame["height"]
        (line,) = axes.plot(frame["distance"], frame["loss"])
        band = straight + frame["low"], straight + frame["high"]
        axes.fill_between(frame["distance"], *band, color=line.get_color(), alpha=0.25, linewidth=0)
        axes.plot(frame["distance"], straight, "--", color="0.5", lw=0.8)
        foot = float(np.interp(self.position, self.places, straight))
        low, high = (float(end[0]) for end in self.interval())
        label = f"barrier {self.barrier:.3g} [{low:.3g}, {high:.3g}] nats"
        axes.plot([at, at], [foot + low, foot + high], color="C3", marker="_")
        axes.plot(at, foot + self.barrier, color="C3", marker="o", ls="none", label=label)
        axes.set(xlabel="distance between the checkpoints (L2)", ylabel="loss (nats)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return axes


@dataclass(frozen=True, eq=False)
class Connections(Saved):
    """The line between two checkpoints on several panels of images.

    Attributes:
        panels: name of a panel ("source", "target") -> the line on its images.
    """

    panels: dict[str, Connection]

    def barriers(self) -> "pd.DataFrame":
        """Return one row for each panel: the barrier with its interval over images (nats), and where it lies."""
        import pandas as pd

        rows = []
        for panel, found in self.panels.items():
            low, high = (float(end[0]) for end in found.interval())
            place = {"position": found.position, "distance": found.position * found.length}
            rows.append({"panel": panel, "barrier": found.barrier, "low": low, "high": high, **place})
        return pd.DataFrame(rows)

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each panel and place, as `Connection.to_frame`."""
        import pandas as pd

        frames = [found.to_frame().assign(panel=panel) for panel, found in self.panels.items()]
        return pd.concat(frames, ignore_index=True)

    def plot(self, axes: "Sequence[Axes] | None" = None) -> "list[Axes]":
        """Draw each panel on axes of its own, as `Connection.plot`.

        Args:
            axes: one for each panel; None opens new ones.
        """
        given = [None] * len(self.panels) if axes is None else axes
        return [found.plot(ax) for found, ax in zip(self.panels.values(), given, strict=True)]

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON; without the seconds."""
        parts = {panel: found.to_arrays() for panel, found in self.panels.items()}
        arrays = {f"{panel}.{name}": each for panel, (own, _) in parts.items() for name, each in own.items()}
        return arrays, {panel: facts for panel, (_, facts) in parts.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns; other facts are ignored."""
        own: dict[str, dict[str, npt.NDArray[Any]]] = {}
        for full, array in arrays.items():
            panel, _, name = full.partition(".")
            own.setdefault(panel, {})[name] = array
        return cls({panel: Connection.from_arrays(each, facts[panel]) for panel, each in own.items()})


def by_stratum(table: FloatArray, stratum: npt.NDArray[np.int64]) -> FloatArray:
    """Return the means (T, S) over the images of each stratum of numbers (T, N)."""
    with np.errstate(invalid="ignore"):
        return np.stack([table[:, stratum == s].mean(axis=1) for s in range(stratum.max() + 1)], axis=1)


def chord(values: FloatArray, places: FloatArray) -> FloatArray:
    """Return the straight line between the ends (T, ...) of values."""
    shares = places.reshape(-1, *(1,) * (values.ndim - 1))
    return np.asarray((1 - shares) * values[0] + shares * values[-1])
