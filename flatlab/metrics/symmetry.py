"""Is a sample symmetric? Order statistics against their mirror images (arXiv 2410.06020, App. L; Tukey's summaries).

App. L plots "reverse-order and forward-order medians": read here as the symmetry plot, distances of the upper half
from the median against those of the lower half, which lie on the identity line where the sample is symmetric.
"""

from dataclasses import dataclass

import numpy as np

from flatlab.errors import UserError
from flatlab.metrics.results import FloatArray
from flatlab.seeds import derive

POINTS = 2000  # pairs of order statistics that are kept, at equal ranks


@dataclass(frozen=True, eq=False, kw_only=True)
class Symmetry:
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
