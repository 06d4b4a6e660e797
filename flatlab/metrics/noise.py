"""Quantization noise w_q - w: is it uniform, and is it symmetric (arXiv 2410.06020, section 3.2 and App. L)?

A histogram's divergence is biased: a sample that *is* uniform gives about (B - 1) / (2 N) nats in B bins. So each
number stands beside its null, what uniform samples of the same size give, drawn exactly: between the smallest and the
largest of a uniform sample, which span the bins, the others are uniform again.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy.special import chdtrc, ndtri, xlogy
from torch import Tensor

from flatlab.errors import UserError
from flatlab.metrics.results import Cost, FloatArray
from flatlab.metrics.symmetry import Symmetry, symmetry, symmetry_null
from flatlab.seeds import derive

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Numbers = Tensor | npt.ArrayLike
BINS = 100  # the paper gives none; its values are then what 55,000 and 7,000 to 92,000 uniform numbers give
DRAWS = 399  # uniform samples behind a null
FEWEST = 8  # numbers that a distribution can be judged by
ROUNDING = 2.4e-7  # of w / step, twice float32's: a weight moved by more than half a step was clipped


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizationNoise:
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
        cost: seconds; nothing goes forward.
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
    def counts(self) -> npt.NDArray[np.int64]:
        """The histogram (B,)."""
        return np.histogram(self.noise, self.bins, (self.noise[0], self.noise[-1]))[0]

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
        return _share_above(self.kl_draws, self.kl)

    @property
    def departure_pvalue(self) -> float:
        """The share of symmetric samples whose halves differ as much somewhere (`Symmetry.departure`)."""
        return _share_above(self.symmetry_draws["departure"], float(self.symmetry.departure))

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
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if ax is None else ax
        low, high = self.noise[0], self.noise[-1]
        axes.stairs(self.counts / self.count * self.bins / (high - low), np.linspace(low, high, self.bins + 1))
        axes.axhline(1 / (high - low), color="k", linestyle="--", linewidth=1)
        axes.set(xlabel="quantization noise", ylabel="density")
        return axes


def quantization_noise(
    weight: Numbers,
    quantized: Numbers,
    *,
    step: Numbers | None = None,
    normalise: bool = False,
    bins: int = BINS,
    seed: int = 0,
) -> QuantizationNoise:
    """Compare the noise w_q - w with a uniform that has the same minimum and maximum.

    Args:
        weight: w, of any shape; channels are the first axis of more than one.
        quantized: w_q, in the same shape.
        step: step sizes that broadcast against w; with them, clipped weights are known and left out.
        normalise: divide by the step sizes: where these differ, pooled raw noise is a mixture, and not uniform.
        bins: B of the histogram.
        seed: of the nulls.

    Raises:
        UserError: shapes that differ, values that are not finite, or no noise to judge.
    """
    start = time.perf_counter()
    w, w_q = _numbers(weight, "weight"), _numbers(quantized, "quantized weight")
    if w.shape != w_q.shape:
        raise UserError(f"A weight and its quantized twin have one shape, but {w.shape} and {w_q.shape} came.")
    if normalise and step is None:
        raise UserError("Noise is normalised by its step sizes: hand in step=..., or leave normalise out.")
    if bins < 2:
        raise UserError(f"A histogram needs at least 2 bins, but {bins} came.")
    alive = np.broadcast_to(_alive(w), w.shape)
    steps = None if step is None else np.broadcast_to(_numbers(step, "step size"), w.shape)
    ratio = None if steps is None else (w_q - w) / steps
    kept = alive if steps is None else alive & (np.abs(w_q - w) <= 0.5 * steps + ROUNDING * np.abs(w))
    noise = np.sort((ratio if normalise and ratio is not None else w_q - w)[kept])
    if len(noise) < FEWEST or noise[0] == noise[-1]:
        raise UserError(_no_noise(w, noise))
    mirrored = symmetry(noise)
    return QuantizationNoise(
        noise=noise,
        bins=bins,
        clipped=float("nan") if ratio is None else float(1 - kept.sum() / alive.sum()),
        zero_channels=int((~_alive(w)).sum()),
        variance_ratio=float("nan") if ratio is None else float(12 * np.square(ratio[kept]).mean()),
        kl_draws=kl_null(len(noise), bins, seed=seed),
        symmetry=mirrored,
        symmetry_draws=symmetry_null(mirrored, len(noise), draws=DRAWS, seed=seed),
        cost=Cost(seconds=time.perf_counter() - start),
    )


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


def _share_above(draws: FloatArray, value: float) -> float:
    """Return the Monte Carlo p-value of a value, itself counted as one of the draws."""
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))


def _numbers(values: Numbers, name: str) -> FloatArray:
    """Return values as float64; refuse what is not finite."""
    found: Any = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(found, dtype=np.float64)
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise UserError(f"The {name} holds {broken} of {array.size} values that are not finite, so it has no noise.")
    return array


def _alive(w: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which channels hold anything but zeros, shaped to broadcast; a vector is one channel."""
    axes = tuple(range(1, w.ndim)) if w.ndim > 1 else None
    return np.asarray((w != 0).any(axis=axes, keepdims=True))


def _no_noise(w: FloatArray, noise: FloatArray) -> str:
    if not w.any():
        return "The weight holds only zeros, so quantization adds no noise to it."
    if len(noise) < FEWEST:
        return f"Only {len(noise)} of {w.size} weights are not clipped; a distribution needs {FEWEST} at least."
    return (
        f"The noise is {noise[0]:g} at each of {len(noise)} weights, so it has no distribution: hand in the weights "
        "before quantization (a baked network has only those after it)."
    )
