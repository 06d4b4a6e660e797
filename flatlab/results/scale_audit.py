"""Change of flatness measures under rescaling of layers."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.errors import count_of
from flatlab.results.estimate import Cost, axes_of
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

By = Literal["layer", "channel"]


@dataclass(frozen=True)
class Pair:
    """Two modules that can be scaled against each other: the first's outputs by c, the second's by 1 / c."""

    first: str
    second: str
    kind: Literal["norm", "layers"]


@dataclass(frozen=True)
class Refusal:
    """A layer that cannot be scaled against the next one, and why."""

    first: str
    reason: str


WAYS: tuple[By, ...] = ("layer", "channel")
ENDS = ("after", "low", "high")
SAME = 0.01  # a ratio nearer to one than that is called invariant: rounding of float32, and two eigenvalue searches


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaleAudit(Saved):
    """Change of flatness measures under rescalings that do not change the function.

    Attributes:
        measures: (M,) their names.
        before: (M,) of the unchanged network.
        after: (2, M) rescaled with one factor for each pair of layers, and with one for each channel.
        low, high: (2, M) 95 % interval of after / before over common directions; of trace and eigenvalue it is NaN.
        deviation: (2,) largest change of an output, as a share of the largest output: rounding.
        pairs: what was rescaled.
        refusals: what was not, and why.
        most: the largest factor.
        seed: of factors and directions.
        cost: total.
    """

    measures: tuple[str, ...]
    before: FloatArray
    after: FloatArray
    low: FloatArray
    high: FloatArray
    deviation: FloatArray
    pairs: tuple[Pair, ...]
    refusals: tuple[Refusal, ...]
    most: float
    seed: int
    cost: Cost

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON; of the cost the products alone."""
        facts = {"rows": self.to_frame().to_dict("records"), "pairs": [asdict(each) for each in self.pairs]}
        facts |= {"refusals": [asdict(each) for each in self.refusals]}
        return {"deviation": self.deviation}, {**facts, "hvps": self.cost.hvps}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns and the spec's fields; the most invariant measure first."""
        rows = facts["rows"]
        ways = {name: np.array([[row[f"{name}, by {way}"] for row in rows] for way in WAYS]) for name in ENDS}
        return cls(
            measures=tuple(row["measure"] for row in rows),
            before=np.array([row["before"] for row in rows]),
            deviation=arrays["deviation"],
            pairs=tuple(Pair(**each) for each in facts["pairs"]),
            refusals=tuple(Refusal(**each) for each in facts["refusals"]),
            most=facts["most"],
            seed=facts["seed"],
            cost=Cost(np.nan, 0, facts["hvps"]),
            **ways,
        )

    @property
    def ratio(self) -> FloatArray:
        """The factors (2, M) by which the measures changed."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.after / self.before)

    @property
    def movement(self) -> FloatArray:
        """For each measure (M,) the larger of the two factors, taken so that it is at least 1: 1 is invariant."""
        with np.errstate(divide="ignore", invalid="ignore"):
            # Infinite if the sign changes.
            each = np.where(self.ratio > 0, np.exp(np.abs(np.log(np.abs(self.ratio)))), np.inf)
        return np.asarray(np.nan_to_num(each, nan=np.inf).max(axis=0))

    @property
    def ranking(self) -> list[str]:
        """The measures, the most invariant first."""
        return [self.measures[i] for i in np.argsort(self.movement, kind="stable")]

    @property
    def remarks(self) -> list[str]:
        """Sentences on what was rescaled, by how much the outputs changed, and what was not rescaled."""
        kinds = [pair.kind for pair in self.pairs]
        rescaled = (
            f"rescaled {count_of(kinds.count('norm'), 'layer')} against BatchNorm and"
            f" {count_of(kinds.count('layers'), 'pair')} of layers; outputs moved by"
            f" {self.deviation.max():.1e} of the largest."
        )
        return [rescaled, *(f"not rescaled: {each.first}, {each.reason}." for each in self.refusals)]

    def to_frame(self) -> "pd.DataFrame":
        """Return a table, the most invariant first: before, and after each way of rescaling with its ratio."""
        import pandas as pd

        columns: dict[str, object] = {"measure": self.measures, "before": self.before}
        for row, way in enumerate(WAYS):
            columns |= {f"after, by {way}": self.after[row], f"ratio, by {way}": self.ratio[row]}
            columns |= {f"low, by {way}": self.low[row], f"high, by {way}": self.high[row]}
        frame = pd.DataFrame(columns).assign(movement=self.movement, invariant=self.movement < 1 + SAME)
        return frame.sort_values("movement", kind="stable", ignore_index=True)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the factors on a logarithmic axis, the most invariant measure on top."""
        axes, frame = axes_of(ax), self.to_frame()
        places = np.arange(len(frame))[::-1]
        axes.axvline(1.0, color="0.6", lw=0.8)
        for way, shift, marker in zip(WAYS, (0.12, -0.12), "os", strict=True):
            value = frame[f"ratio, by {way}"]
            low, high = (frame[f"{end}, by {way}"].fillna(value) for end in ENDS[1:])
            bars = np.maximum([value - low, high - value], 0.0)
            label = f"one factor for each {'pair of layers' if way == 'layer' else way}"
            axes.errorbar(value, places + shift, xerr=bars, fmt=marker, ms=4, label=label)
        axes.set_xscale("log")
        axes.set_yticks(places, frame["measure"].tolist())
        axes.set(xlabel="after / before (the function is the same)")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return axes
