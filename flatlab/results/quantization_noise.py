"""Quantization noise of a layer: is it uniform, is it symmetric, and what does chance alone give?"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, ndtri, xlogy

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.results.estimate import Cost, axes_of
from flatlab.saving import Saved
from flatlab.seeds import derive

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


POINTS = 2000  # pairs of order statistics that are kept, at equal ranks


@dataclass(frozen=True, eq=False, kw_only=True)
class Symmetry(Saved):
    """The halves of one sample, or of several (leading axes).

    Attributes:
        median: m, (...).
        lower: (..., K) distances m - x_(i) of the lower half, the farthest first.
        upper: (..., K) distances x_(n + 1 - i) - m of their mirror images.
    """

    median: FloatArray
    lower: FloatArray
    upper: FloatArray

    @property
    def quartile(self) -> int:
        """The pair that lies in the middle of the halves: their distance is the interquartile range."""
        return int(self.lower.shape[-1] // 2)

    @property
    def departure(self) -> FloatArray:
        """The largest |M_i - m| over the mid-summaries M_i = (x_(i) + x_(n + 1 - i)) / 2, in interquartile ranges."""
        return np.asarray(np.abs(self.upper - self.lower).max(axis=-1) / 2 / self._range())

    @property
    def slope(self) -> FloatArray:
        """The least squares slope, through the origin, of upper on lower distances; 1 where symmetric."""
        return np.asarray((self.upper * self.lower).sum(axis=-1) / np.square(self.lower).sum(axis=-1))

    @property
    def bowley(self) -> FloatArray:
        """The quartile skewness (Q3 + Q1 - 2 m) / (Q3 - Q1), in [-1, 1]; 0 where symmetric (Bowley 1901)."""
        return np.asarray((self.upper - self.lower)[..., self.quartile] / self._range())

    def scalars(self) -> dict[str, float]:
        """Return the three numbers by name."""
        return {name: float(values) for name, values in self.of_each().items()}

    def of_each(self) -> dict[str, FloatArray]:
        """Return the three numbers of each sample by name."""
        return {"departure": self.departure, "slope": self.slope, "bowley": self.bowley}

    def _range(self) -> FloatArray:
        return np.asarray((self.upper + self.lower)[..., self.quartile])


def symmetry(sample: FloatArray) -> Symmetry:
    """Return the halves of a sorted sample (N,), thinned to at most 2,000 pairs at equal ranks.

    Raises:
        UserError: where half of the numbers are equal, or there are fewer than four.
    """
    ranks = _ranks(len(sample))
    found = _halves(sample[ranks], sample[len(sample) - 1 - ranks])
    if len(sample) < 4 or not found._range() > 0:
        raise UserError("A symmetry statistic needs four numbers and more, of which the middle half differ.")
    return found


def symmetry_null(found: Symmetry, count: int, *, draws: int, seed: int = 0) -> dict[str, FloatArray]:
    """Return the three numbers (draws,) of symmetric samples of the same size and shape: what sampling alone gives.

    The shape is the sample's own, each distance the mean of its two halves, and ends where it ends, as noise does: the
    extremes of long tails vary by more. Only the order statistics that are looked
    at are drawn: as quantiles of uniform ones, whose spacings are gammas (David and Nagaraja 2003, section 2.3).
    """
    rng = np.random.default_rng(derive("noise", "symmetry", seed))
    ranks = _ranks(count)
    places = 1 + np.concatenate([ranks, (count - 1 - ranks)[::-1]])
    spacings = rng.standard_gamma(np.diff(places, prepend=0, append=count + 1), size=(draws, len(places) + 1))
    sums = np.cumsum(spacings, axis=-1)
    off = sums[:, :-1] / sums[:, -1:] - 0.5  # uniform order statistics, off their centre
    distances = (found.lower + found.upper)[::-1] / 2
    values = np.sign(off) * np.interp(np.abs(off), 0.5 - (ranks[::-1] + 1) / (count + 1), distances)
    half = len(ranks)
    return _halves(values[:, :half], values[:, half:][:, ::-1]).of_each()


def _ranks(count: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Return ranks of the lower half, the median's last: from 0, at most POINTS of them."""
    last = (count - 1) // 2
    return np.unique(np.linspace(0, last, min(last + 1, POINTS)).round().astype(np.int64))


def _halves(lower: FloatArray, upper: FloatArray) -> Symmetry:
    median = (lower[..., -1] + upper[..., -1]) / 2
    return Symmetry(median=median, lower=median[..., None] - lower, upper=upper - median[..., None])


BINS = 100  # the paper gives none; its values are then what 55,000 and 7,000 to 92,000 uniform numbers give
DRAWS = 399  # uniform samples behind a null


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of numbers in bins of equal width, from minimum to maximum.

    Attributes:
        counts: (B,).
        edges: (B + 1,), in the unit of the numbers.
    """

    counts: npt.NDArray[np.int64]
    edges: FloatArray

    def plot(self, ax: "Axes | None" = None, *, color: str = "C0") -> "Axes":
        """Draw the density."""
        axes = axes_of(ax)
        density = self.counts / self.counts.sum() / np.diff(self.edges)
        axes.stairs(density, self.edges, fill=True, color=color, alpha=0.75)
        return axes

    def plot_noise(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the density of noise, and that of the uniform on the same range as a line."""
        axes, (low, high) = self.plot(ax), self.edges[[0, -1]]
        axes.hlines(1 / (high - low), low, high, color="k", linestyle="--", label="uniform")
        axes.set(xlabel="quantization noise", ylabel="density")
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizationNoise(Saved):
    """Quantization noise against a uniform with the same minimum and maximum.

    Attributes:
        noise: (N,) the noise of the weights that were not clipped, sorted; in steps where it was normalised.
        bins: B, equal ones from minimum to maximum.
        clipped: share of the weights that lie beyond the outer levels by half a step and more, and were left out;
            NaN where no step size was given.
        zero_channels: channels of zeros, left out: they have no noise.
        variance_ratio: mean of 12 (noise / step)^2, which is 1 for noise uniform over a step; NaN without a step.
        kl_draws: (D,) divergences of uniform samples of the same size.
        symmetry: how far the two halves mirror each other.
        symmetry_draws: its three scalars (D,) for symmetric samples of the same size and shape.
        cost: seconds; no forward pass is made.
    """

    noise: FloatArray
    bins: int
    clipped: float
    zero_channels: int
    variance_ratio: float
    kl_draws: FloatArray
    symmetry: Symmetry
    symmetry_draws: dict[str, FloatArray]
    cost: Cost

    @property
    def count(self) -> int:
        """N, the numbers behind the histogram."""
        return len(self.noise)

    @cached_property
    def histogram(self) -> Histogram:
        """The noise in B bins."""
        return Histogram(*np.histogram(self.noise, self.bins))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """The counts (B,) of the histogram."""
        return self.histogram.counts

    @property
    def kl(self) -> float:
        """KL(noise || uniform) in nats as the paper reports it, bias included."""
        return float(kl_to_uniform(self.counts))

    @property
    def kl_null(self) -> float:
        """What the estimator gives in the mean for a uniform sample of this size."""
        return float(self.kl_draws.mean())

    @property
    def kl_miller_madow(self) -> float:
        """The divergence less (B_nonempty - 1) / (2 N): the textbook's correction, right where N is large beside B."""
        return self.kl - (int((self.counts > 0).sum()) - 1) / (2 * self.count)

    @property
    def kl_pvalue(self) -> float:
        """The share of uniform samples whose divergence is as large (never below 1 / (D + 1))."""
        return share_above(self.kl_draws, self.kl)

    @property
    def departure_pvalue(self) -> float:
        """The share of symmetric samples whose halves differ as much somewhere (`Symmetry.departure`)."""
        return share_above(self.symmetry_draws["departure"], float(self.symmetry.departure))

    @property
    def value(self) -> float:
        """KL(noise || uniform) in nats, corrected for the bias: less its null."""
        return self.kl - self.kl_null

    @property
    def stderr(self) -> float:
        """Standard error of `value`: the null's spread, and that of the mean log ratio beyond it (delta method)."""
        p = self.counts / self.count
        root = xlogy(np.sqrt(p), p * self.bins)
        beyond = float(root @ root) - self.kl**2 - (self.bins - 1) / self.count  # the last is what noise alone gives
        return float(np.sqrt(max(0.0, beyond) / self.count + self.kl_draws.var(ddof=1)))

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the normal interval (low, high) of `value` at this level."""
        half = float(ndtri((1 + level) / 2)) * self.stderr
        return self.value - half, self.value + half

    @property
    def explained(self) -> float:
        """The share of the divergence that the null explains, at most 1."""
        return min(1.0, self.kl_null / self.kl) if self.kl > 0 else 1.0

    @cached_property
    def ks(self) -> tuple[float, float]:
        """Kolmogorov-Smirnov distance to the uniform, and its p-value given minimum and maximum."""
        from scipy.stats import kstest  # here: it takes half a second to load

        low, high = self.noise[0], self.noise[-1]
        found = kstest((self.noise[1:-1] - low) / (high - low), "uniform")
        return float(found.statistic), float(found.pvalue)

    @property
    def chi_square_pvalue(self) -> float:
        """The p-value of the chi-square test of equal bins, B - 1 degrees of freedom."""
        expected = self.count / self.bins
        return float(chdtrc(self.bins - 1, np.square(self.counts - expected).sum() / expected))

    def statistics(self) -> dict[str, float]:
        """Return all numbers by name, each with its null beside it where it has one."""
        low, high = self.interval()
        facts: dict[str, float] = {"count": self.count, "bins": self.bins, "kl": self.kl, "kl_null": self.kl_null}
        facts |= {"kl_corrected": self.value, "kl_low": low, "kl_high": high, "kl_pvalue": self.kl_pvalue}
        facts |= {"kl_miller_madow": self.kl_miller_madow, "explained": self.explained, "clipped": self.clipped}
        facts |= {"zero_channels": self.zero_channels, "variance_ratio": self.variance_ratio}
        facts |= {"ks": self.ks[0], "ks_pvalue": self.ks[1], "chi_square_pvalue": self.chi_square_pvalue}
        for name, scalar in self.symmetry.scalars().items():
            null_low, null_high = np.quantile(self.symmetry_draws[name], [0.025, 0.975])
            facts |= {name: scalar, f"{name}_null_low": float(null_low), f"{name}_null_high": float(null_high)}
        return facts | {"departure_pvalue": self.departure_pvalue}

    def to_frame(self) -> "pd.DataFrame":
        """Return one row with all numbers."""
        import pandas as pd

        return pd.DataFrame([self.statistics()])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the density of the noise, and the uniform's as a line."""
        return self.histogram.plot_noise(ax)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNoise(Saved):
    """What is kept of one layer's quantization noise, pooled in one way.

    Attributes:
        numbers: `layer` (name), `index`, `mode` of pooling, `bits`, and the statistics of `QuantizationNoise`.
        weight: of the weights before quantization.
        noise: of their noise.
        lower: (K,) distances of the lower half from the median, as in `Symmetry`.
        upper: (K,) distances of their mirror images.
    """

    numbers: dict[str, Any]
    weight: Histogram
    noise: Histogram
    lower: FloatArray
    upper: FloatArray

    @classmethod
    def of(cls, found: QuantizationNoise, weight: FloatArray, numbers: dict[str, Any]) -> Self:
        """Return what is kept of a layer's noise, the weight's histogram in as many bins."""
        return cls(
            numbers={**numbers, **found.statistics()},
            weight=Histogram(*np.histogram(weight, found.bins)),
            noise=found.histogram,
            lower=found.symmetry.lower,
            upper=found.symmetry.upper,
        )

    @property
    def value(self) -> float:
        """KL(noise || uniform) in nats, less what a uniform sample has."""
        return float(self.numbers["kl_corrected"])

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval (low, high) of `value`."""
        return self.numbers["kl_low"], self.numbers["kl_high"]

    def to_frame(self) -> "pd.DataFrame":
        """Return one row with all numbers."""
        import pandas as pd

        return pd.DataFrame([self.numbers])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the density of the noise, and the uniform's as a line."""
        return self.noise.plot_noise(ax)


@dataclass(frozen=True, eq=False)
class NetworkNoise(Saved):
    """The quantization noise of a network's layers, each pooled in several ways."""

    layers: tuple[LayerNoise, ...]

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each layer and mode of pooling, as `LayerNoise.to_frame`."""
        import pandas as pd

        return pd.DataFrame([layer.numbers for layer in self.layers])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the divergence from the uniform over the layers, less what a uniform sample has; 95 % intervals."""
        axes = axes_of(ax)
        for mode, rows in self.to_frame().groupby("mode", sort=False):
            bars = [rows["kl_corrected"] - rows["kl_low"], rows["kl_high"] - rows["kl_corrected"]]
            axes.errorbar(rows["index"], rows["kl_corrected"], yerr=bars, fmt="o", ms=4, label=str(mode))
        axes.set(xlabel="layer", ylabel="KL to the uniform (nats)")
        axes.legend()
        return axes

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], list[dict[str, Any]]]:
        """Return the content of a measurement's file: arrays, and rows for JSON."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for layer in self.layers:
            parts = layer.weight.counts, layer.weight.edges, layer.noise.counts, layer.noise.edges
            arrays |= dict(zip(_names(layer.numbers), (*parts, layer.lower, layer.upper), strict=True))
        return arrays, [layer.numbers for layer in self.layers]

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: list[dict[str, Any]]) -> Self:
        """Return the noise of the layers that rows name, from what `to_arrays` returns."""
        layers = []
        for row in facts:
            weight, weight_edges, noise, edges, lower, upper = (arrays[name] for name in _names(row))
            histograms = {"weight": Histogram(weight, weight_edges), "noise": Histogram(noise, edges)}
            layers.append(LayerNoise(numbers=row, lower=lower, upper=upper, **histograms))
        return cls(tuple(layers))


def _names(row: dict[str, Any]) -> list[str]:
    """Return the names of the arrays of one layer and mode, in the order of `LayerNoise`."""
    parts = "weight edges-weight {0} edges-{0} lower-{0} upper-{0}".format(row["mode"])
    return [f"{part}-{row['index']:03d}" for part in parts.split()]


def kl_to_uniform(counts: npt.ArrayLike) -> FloatArray:
    """Return KL(p || uniform) in nats of histograms (..., B); empty bins add nothing."""
    table = np.asarray(counts, dtype=np.float64)
    p = table / table.sum(axis=-1, keepdims=True)
    return np.asarray(xlogy(p, p * table.shape[-1]).sum(axis=-1))


def kl_null(count: int, bins: int = BINS, *, draws: int = DRAWS, seed: int = 0) -> FloatArray:
    """Return the divergences (draws,) that uniform samples of `count` numbers show in bins from their min to their max.

    In the mean about (bins - 1) / (2 count) (Miller 1955).
    """
    rng = np.random.default_rng(derive("noise", "uniform", seed))
    counts = rng.multinomial(count - 2, np.full(bins, 1 / bins), size=draws)
    counts[:, [0, -1]] += 1  # minimum and maximum
    return kl_to_uniform(counts)


def share_above(draws: FloatArray, value: float) -> float:
    """Return the Monte Carlo p-value of a value, itself counted as one of the draws."""
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))
