"""What every sampled result shares: a value, its uncertainty, the raw draws, and what they cost."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from flatlab.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FloatArray = npt.NDArray[np.float64]
MISSED = ("budget", "nonfinite", "interrupted")  # why sampling ends without what was asked for
Report = Callable[[int, int], None]
"""Called as ``report(done, total)`` while a metric samples."""


@dataclass(frozen=True)
class Cost:
    """What a number cost.

    Attributes:
        forward_passes: in passes over all the images of the landscape; a part of them counts as a part.
        images: how many times one image went forward through the model.
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


@dataclass(frozen=True)
class Estimate:
    """A mean over draws, its standard error, and the degrees of freedom behind that."""

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


def check_level(level: float) -> float:
    """Return the level of an interval or a test, a probability.

    Raises:
        UserError: if it does not lie strictly between 0 and 1.
    """
    if isinstance(level, bool | str) or not 0.0 < level < 1.0:
        raise UserError(f"The level of an interval must lie strictly between 0 and 1, but is {level}: write 0.95.")
    return float(level)


def mean_of(draws: FloatArray) -> Estimate:
    """Return the mean of independent draws (K,) with its standard error; NaN where there are too few."""
    count = len(draws)
    with np.errstate(invalid="ignore"):  # the spread of infinite losses is NaN, and is shown so
        stderr = float(draws.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        return Estimate(float(draws.mean()) if count else float("nan"), stderr, max(1, count - 1))


def standing(own: float, draws: FloatArray) -> tuple[float, float]:
    """Return how a number stands among draws (K,): z, and the share that lies below, (1 + count) / (K + 2)."""
    spread = float(draws.std(ddof=1))
    z = (own - float(draws.mean())) / spread if spread > 0 else float("nan")
    return z, (1 + int((draws < own).sum())) / (len(draws) + 2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sampled(ABC):
    """Means over draws, along an axis such as the radius.

    Attributes:
        cost: what they cost together.
    """

    cost: Cost

    over: ClassVar[str] = "directions"
    """What was drawn anew for each sample; an interval speaks of nothing else."""

    @property
    @abstractmethod
    def estimates(self) -> list[Estimate]:
        """The number at each place on the axis, with its uncertainty."""

    @property
    @abstractmethod
    def raw(self) -> list[FloatArray]:
        """The draws at each place on the axis, as they came."""

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
        """The share of raw numbers that are infinite or NaN; they are kept as they came."""
        broken = np.concatenate([~np.isfinite(draws).ravel() for draws in self.raw])
        return float(broken.mean()) if len(broken) else 0.0

    @property
    def converged(self) -> bool:
        """Whether the accuracy that was asked for is reached; true where none is asked for."""
        return True

    @property
    def reached(self) -> list[bool]:
        """Whether it is reached at each place on the axis."""
        return [self.converged] * len(self.estimates)

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each place on the axis; `reached` says where the accuracy is as asked."""
        import pandas as pd

        name, places = self.axis
        low, high = self.interval()
        columns = {name: places, "value": self.value, "stderr": self.stderr, "low": low, "high": high}
        return pd.DataFrame(columns).assign(over=self.over, reached=self.reached)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the value as a line with its 95 % interval as a band."""
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if ax is None else ax
        name, places = self.axis
        (line,) = axes.plot(places, self.value)
        axes.fill_between(places, *self.interval(), color=line.get_color(), alpha=0.25, linewidth=0)
        axes.set_xlabel(name)
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Stopped(Sampled):
    """Means that are sampled until something ends it.

    Attributes:
        stopped: for each place on the axis "samples", "accuracy", "budget", "nonfinite" or "interrupted".
    """

    stopped: tuple[str, ...]

    @property
    def converged(self) -> bool:
        """Whether all places reached the accuracy, or the number of samples, that was asked for."""
        return all(self.reached)

    @property
    def reached(self) -> list[bool]:
        """Whether each place did."""
        return [stopped not in MISSED for stopped in self.stopped]
