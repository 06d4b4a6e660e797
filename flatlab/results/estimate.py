"""Estimates with their uncertainty and cost; means over blocks that are evaluated in rounds."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from flatlab.arguments import FloatArray
from flatlab.errors import UserError, choose
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


MISSED = ("budget", "nonfinite", "interrupted")  # reasons why sampling ends below the requested accuracy


@dataclass(frozen=True)
class Cost:
    """The cost of a number.

    Attributes:
        forward_passes: in passes over all the images of the landscape; a part of them counts as a part.
        images: number of forwarded images; one that is forwarded twice counts twice.
        hvps: Hessian-vector products over all the images.
        seconds: wall-clock time on the machine that measured.
    """

    forward_passes: float = 0.0
    images: int = 0
    hvps: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.forward_passes + other.forward_passes,
            self.images + other.images,
            self.hvps + other.hvps,
            self.seconds + other.seconds,
        )


class Stored(Saved):
    """A dataclass whose file holds its fields by their names: arrays as such, all else but None as facts for JSON."""

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON."""
        own: Any = self
        named = {each.name: getattr(self, each.name) for each in fields(own)}
        arrays = {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
        return arrays, {name: value for name, value in named.items() if not (name in arrays or value is None)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns; other facts are ignored."""
        own: Any = cls
        plain = {name: tuple(each) if isinstance(each, list) else each for name, each in facts.items()}
        found = {**plain, **arrays}
        return cls(**{each.name: found[each.name] for each in fields(own) if each.name in found})


@dataclass(frozen=True)
class Estimate:
    """A mean over draws, its standard error, and its degrees of freedom."""

    value: float
    stderr: float
    freedom: int

    @property
    def p_value(self) -> float:
        """Two-sided p-value of Student's t test against zero; NaN where the standard error is not known."""
        if not self.stderr > 0:
            return float("nan") if np.isnan(self.stderr) else float(self.value == 0)
        return 2 * float(stdtr(self.freedom, -abs(self.value) / self.stderr))

    def half_width(self, level: float = 0.95) -> float:
        """Return half the length of Student's t interval.

        Args:
            level: a probability.

        Raises:
            UserError: if it does not lie strictly between 0 and 1.
        """
        return float(stdtrit(self.freedom, (1.0 + check_level(level)) / 2.0)) * self.stderr

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return Student's t interval (low, high) at this level."""
        half = self.half_width(level)
        return self.value - half, self.value + half

    def columns(self, level: float = 0.95) -> dict[str, float]:
        """Return value, standard error and interval under the names that tables give them."""
        low, high = self.interval(level)
        return {"value": self.value, "stderr": self.stderr, "low": low, "high": high}


def check_level(level: float) -> float:
    """Return the level of an interval or a test, a probability.

    Raises:
        UserError: if it does not lie strictly between 0 and 1.
    """
    if isinstance(level, bool | str) or not 0.0 < level < 1.0:
        raise UserError(f"The level of an interval must lie strictly between 0 and 1 (such as 0.95), got {level}.")
    return float(level)


def rows_of(strata: str | Iterable[str], known: Sequence[str]) -> list[int]:
    """Return the indices of some strata, each once.

    Args:
        strata: their names, or one.
        known: all names, in order.

    Raises:
        UserError: if a name is unknown, or none is given.
    """
    asked = dict.fromkeys([strata] if isinstance(strata, str) else strata)
    if not asked:
        raise UserError(f"At least one stratum must be given; available: {', '.join(known)}.")
    return [known.index(choose("stratum", name, known)) for name in asked]


def axes_of(ax: "Axes | None") -> "Axes":
    """Return the axes that were given, or new ones."""
    import matplotlib.pyplot as plt

    return plt.subplots()[1] if ax is None else ax


def mean_of(draws: FloatArray) -> Estimate:
    """Return the mean of independent draws (K,) with its standard error; NaN where there are too few."""
    count = len(draws)
    with np.errstate(invalid="ignore"):  # the spread of infinite losses is NaN, and is reported as such
        stderr = float(draws.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        return Estimate(float(draws.mean()) if count else float("nan"), stderr, max(1, count - 1))


def ratio_of(above: FloatArray, below: FloatArray) -> Estimate:
    """Return the ratio of two means over the same draws (K,), its standard error by linearisation."""
    if not below.mean():
        return Estimate(float("nan"), float("nan"), max(1, len(above) - 1))
    ratio = float(above.mean() / below.mean())
    spread = mean_of((above - ratio * below) / below.mean())
    return Estimate(ratio, spread.stderr, spread.freedom)


def standing(own: float, draws: FloatArray) -> tuple[float, float]:
    """Return the z-score of a number among draws (K,), and the share below it, (1 + count) / (K + 2)."""
    spread = float(draws.std(ddof=1))
    z = (own - float(draws.mean())) / spread if spread > 0 else float("nan")
    return z, (1 + int((draws < own).sum())) / (len(draws) + 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sampled(Saved, ABC):
    """Means over draws, along an axis such as the radius.

    Attributes:
        cost: total.
    """

    cost: Cost

    over: ClassVar[str] = "directions"
    """What was drawn independently for each sample; intervals are over this alone."""

    @property
    @abstractmethod
    def estimates(self) -> list[Estimate]:
        """The number at each place on the axis, with its uncertainty."""

    @property
    @abstractmethod
    def raw(self) -> list[FloatArray]:
        """The draws at each place on the axis."""

    @property
    @abstractmethod
    def axis(self) -> tuple[str, FloatArray]:
        """Name and places of the axis that `value` runs along."""

    @property
    def value(self) -> FloatArray:
        """The means; not finite where a draw is not."""
        return np.array([each.value for each in self.estimates])

    @property
    def stderr(self) -> FloatArray:
        """The standard errors of `value`."""
        return np.array([each.stderr for each in self.estimates])

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Return Student's t intervals (low, high) at this level."""
        half = np.array([each.half_width(level) for each in self.estimates])
        return self.value - half, self.value + half

    @property
    def nonfinite_share(self) -> float:
        """The share of raw numbers that are infinite or NaN; they are kept."""
        broken = np.concatenate([~np.isfinite(draws).ravel() for draws in self.raw])
        return float(broken.mean()) if len(broken) else 0.0

    @property
    def converged(self) -> bool:
        """Whether the requested accuracy is reached; true where none is requested."""
        return True

    @property
    def reached(self) -> list[bool]:
        """Whether it is reached at each place on the axis."""
        return [self.converged] * len(self.estimates)

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each place on the axis; `reached` is of the requested accuracy."""
        import pandas as pd

        name, places = self.axis
        low, high = self.interval()
        columns = {name: places, "value": self.value, "stderr": self.stderr, "low": low, "high": high}
        return pd.DataFrame(columns).assign(over=self.over, reached=self.reached)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the value as a line with its 95 % interval as a band."""
        axes = axes_of(ax)
        name, places = self.axis
        (line,) = axes.plot(places, self.value)
        axes.fill_between(places, *self.interval(), color=line.get_color(), alpha=0.25, linewidth=0)
        axes.set_xlabel(name)
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Stopped(Sampled):
    """Means that are sampled until a stopping criterion holds.

    Attributes:
        stopped: for each place on the axis "samples", "accuracy", "budget", "nonfinite" or "interrupted".
    """

    stopped: tuple[str, ...]

    @property
    def converged(self) -> bool:
        """Whether all places reached the accuracy, or the number of samples, that was requested."""
        return all(self.reached)

    @property
    def reached(self) -> list[bool]:
        """Whether each place did."""
        return [stopped not in MISSED for stopped in self.stopped]


FEW = 16  # repeated blocks below which their spread is not trusted


def estimate(draws: FloatArray, blocks: int, between: float = 0.0) -> Estimate:
    """Return the mean rise from draws (J,), the j-th on block j mod `blocks`.

    From the first complete round on, the value is the mean over blocks of the block means: no image weighs more than
    another. Before that the draws are a sample of images too, drawn without replacement: their whole spread enters
    the standard error, with the finite-population correction for the images already seen (Cochran 1977, Eq. 2.12).

    Args:
        draws: (J,) rises.
        blocks: how many there are.
        between: share of the draws' variance that lies between images; zero where it is not known, and the error is
            then too large.
    """
    if blocks == 1:
        return mean_of(draws)
    index = np.arange(len(draws)) % blocks
    seen = np.bincount(index)  # draws on each block, none of which is empty
    repeated = int((seen > 1).sum())
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is reported as such
        means = np.bincount(index, draws) / seen
        value = float(means.mean()) if len(draws) else float("nan")
        if len(seen) < blocks or repeated < min(FEW, blocks):
            found = mean_of(draws[:blocks])
            left = 1.0 - between * min(len(draws), blocks) / blocks
            return replace(found, value=value, stderr=found.stderr * float(np.sqrt(left)))
        freedom = len(draws) - blocks
        spread = float(np.square(draws - means[index]).sum()) / freedom
    return Estimate(value, float(np.sqrt(spread * (1 / seen).sum())) / blocks, freedom)


@dataclass(frozen=True)
class Components:
    """Variances of the rise of one image's loss: between directions, between images of a stratum, and the rest."""

    directions: float  # V_A
    images: float  # V_B
    rest: float  # V_E

    def of_draw(self, images: int) -> float:
        """Return the variance of a draw on a block of n images, around the block's own mean."""
        return self.directions + self.rest / images

    def between(self, images: int) -> float:
        """Return which share of the spread of draws on different blocks lies between the blocks."""
        whole = self.of_draw(images) + self.images / images
        return self.images / images / whole if whole > 0 else 0.0


def components(table: FloatArray, strata: npt.NDArray[np.int64] | None = None) -> Components:
    """Split the variance of rises (G, D, n): G blocks of n images, each evaluated along D directions of its own.

    Two-way analysis of variance within each block, pooled; negative components are zero.

    Args:
        table: the rises.
        strata: (G, n) of the images: blocks hold a fixed share of each, so that only images of one stratum vary.
    """
    if not np.isfinite(table).all():
        return Components(np.nan, np.nan, np.nan)
    groups, directions, images = table.shape
    by_direction = table.mean(axis=2, keepdims=True)
    by_image = table.mean(axis=1, keepdims=True)
    whole = table.mean(axis=(1, 2), keepdims=True)
    rest = ((table - by_direction - by_image + whole) ** 2).sum() / (groups * (directions - 1) * (images - 1))
    between = images * ((by_direction - whole) ** 2).sum() / (groups * (directions - 1))
    cells = [
        block[:, members == stratum]
        for block, members in zip(table, np.zeros((groups, images)) if strata is None else strata, strict=True)
        for stratum in np.unique(members)
    ]
    of_images = sum(map(_between_images, cells)) / (groups * images)
    return Components(max(0.0, (between - rest) / images), max(0.0, of_images), float(rest))


def _between_images(cell: FloatArray) -> float:
    """Return n times the variance between n images of a stratum, from rises (D, n); zero of one image."""
    directions, images = cell.shape
    if images == 1:
        return 0.0
    around = cell - cell.mean(axis=1, keepdims=True)
    own = around.mean(axis=0)
    noise = np.square(around - own).sum() / (directions - 1) / directions
    return float((np.square(own).sum() - noise) * images / (images - 1))
