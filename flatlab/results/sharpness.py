"""Average- and worst-case sharpness, and the worst rise on a sphere."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.results.estimate import Cost, Estimate, Sampled, Stopped, axes_of, estimate, mean_of
from flatlab.results.verdicts import missed, remarks
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Norm = Literal["l2", "linf"]


@dataclass(frozen=True, eq=False, kw_only=True)
class AverageSharpness(Stopped):
    """The mean rise E L(w + rho c z) - L(w) of the loss under random perturbations, in nats.

    Attributes:
        radii: (R,) rho.
        visits: for each radius, rises (J, S) of the strata's mean losses, one row for each draw on a block of images.
        blocks: (R,) how many blocks the images were cut into; 1 is all at once.
        stopped: for each radius "samples", "accuracy", "budget" or "nonfinite".
        norm: "l2", normal noise, or "linf", uniform noise.
        adaptive: whether noise is scaled by |w|.
        seed: of the draws and the blocks.
    """

    radii: FloatArray
    visits: tuple[FloatArray, ...]
    blocks: tuple[int, ...]
    stopped: tuple[str, ...]
    norm: Norm
    adaptive: bool
    seed: int

    @property
    def estimates(self) -> list[Estimate]:
        """Mean rise at each radius, with its standard error over draws (and images, where these were sampled)."""
        return [estimate(rises.mean(axis=1), b) for rises, b in zip(self.visits, self.blocks, strict=True)]

    @property
    def raw(self) -> list[FloatArray]:
        """The rises."""
        return list(self.visits)

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.radii

    @property
    def remarks(self) -> list[str]:
        """Sentences on non-finite losses and missed accuracy; often none."""
        found = remarks(self.radii, [rises.mean(axis=1) for rises in self.visits], None)
        return [*found, *missed(self.radii, self.stopped, self.stderr)]


@dataclass(frozen=True, eq=False, kw_only=True)
class WorstSharpness(Sampled):
    """The largest rise of a block's loss that ascent found within |u| <= rho, in nats; its mean over blocks.

    Attributes:
        radii: (R,) rho.
        rises: (R, B, restarts) largest rise found by each ascent: lower bounds of the true maxima.
        norm: of the ball, "l2" or "linf".
        adaptive: whether perturbations are scaled by |w|.
        steps: of each ascent.
        seed: of the starts and the blocks.
    """

    radii: FloatArray
    rises: FloatArray
    norm: Norm
    adaptive: bool
    steps: int
    seed: int

    over: ClassVar[str] = "blocks of images"

    @property
    def estimates(self) -> list[Estimate]:
        """Mean over blocks of the best restart, with its standard error over blocks."""
        return [mean_of(found.max(axis=1)) for found in self.rises]

    @property
    def raw(self) -> list[FloatArray]:
        """The rises."""
        return list(self.rises)

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.radii


@dataclass(frozen=True, eq=False, kw_only=True)
class WorstRise(Saved):
    """The largest rise of the loss found on spheres around w, in nats: a lower bound of the true maximum.

    Attributes:
        radii: (R,) Euclidean distances.
        rises: (R, restarts) where each ascent ended; their spread says how much the start mattered.
        steps: of each ascent.
        seed: of the starts.
        cost: what they cost together.
    """

    radii: FloatArray
    rises: FloatArray
    steps: int
    seed: int
    cost: Cost

    @property
    def value(self) -> FloatArray:
        """The largest rise (R,) over the restarts."""
        return np.asarray(self.rises.max(axis=1))

    @property
    def spread(self) -> FloatArray:
        """The difference (R,) between the best and the worst restart."""
        return np.asarray(np.ptp(self.rises, axis=1))

    def to_frame(self) -> "pd.DataFrame":
        """Return a table: radius, the largest rise found (a lower bound, in nats), and its spread over restarts."""
        import pandas as pd

        return pd.DataFrame({"radius": self.radii, "value": self.value, "spread": self.spread})


@dataclass(frozen=True, eq=False)
class Generalisation(Saved):
    """Measures that are compared with generalization gaps, and accuracies on corrupted images.

    Attributes:
        values: by the names of `NAMES`: PAC-Bayes' sigma, plain and relative to the weights; the bounds of both, as
            sqrt(bound / m); worst-case adaptive sharpness (nats); L2 distance from the initialisation; tenth percentile
            of the margins; penalty of rounding and its standard error (nats).
        corruptions: names.
        accuracies: (corruptions, severities).
    """

    values: dict[str, float]
    corruptions: tuple[str, ...]
    accuracies: FloatArray

    NAMES: ClassVar[tuple[str, ...]] = (
        *("sigma", "relative_sigma", "pac_bayes", "magnitude_aware", "sharpness", "distance"),
        *("margin", "penalty", "penalty_stderr"),
    )

    def to_frame(self) -> "pd.DataFrame":
        """Return a row for each measure, and for each corruption and severity the accuracy."""
        import pandas as pd

        rows = [{"name": name, "value": value} for name, value in self.values.items()]
        rows += [
            {"name": name, "severity": level, "value": value}
            for name, along in zip(self.corruptions, self.accuracies.tolist(), strict=True)
            for level, value in enumerate(along, 1)
        ]
        return pd.DataFrame(rows, columns=["name", "severity", "value"])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the accuracy along the severities of each corruption."""
        axes = axes_of(ax)
        for name, along in zip(self.corruptions, self.accuracies, strict=True):
            axes.plot(range(1, 1 + len(along)), along, marker="o", label=name)
        axes.set(xlabel="Severity", ylabel="Accuracy")
        axes.legend()
        return axes

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file."""
        values = np.array([self.values[name] for name in self.NAMES])
        return {"values": values, "accuracies": self.accuracies}, {"corruptions": list(self.corruptions)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns."""
        values = dict(zip(cls.NAMES, arrays["values"].tolist(), strict=True))
        return cls(values, tuple(facts["corruptions"]), arrays["accuracies"])
