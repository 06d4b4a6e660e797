"""Curvature: extreme eigenvalues, trace and spectral density of the Hessian."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.results.estimate import Cost, Estimate, Sampled, axes_of, mean_of, ratio_of
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from torch import Tensor


def blur(places: FloatArray, nodes: FloatArray, weights: FloatArray, *, sigma: float) -> FloatArray:
    """Return sum_i w_i N(x; node_i, sigma^2) at places x (G,) from nodes and weights (m,)."""
    kernel = np.exp(-0.5 * ((places[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return np.asarray(kernel @ weights)


FLOOR = 1e-6  # of the largest eigenvalue: rounding in float32, in which networks are kept
UNVERIFIED = 0.5  # in a file, of a pair that has converged in a search that its budget ended
STATES = {1.0: "yes", UNVERIFIED: "not verified", 0.0: "no"}
NUMBERS = ("trace", "effective rank", "negative weight", "negative share")
MANY = 1e6  # degrees of freedom of a vector, in effect infinitely many
PILOT = 32  # vectors that determine how many are needed, and the interval; two products each
Which = Literal["LA", "SA", "BE"]
Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Spectrum(Saved):
    """Extreme eigenpairs of a symmetric matrix A (P, P).

    Attributes:
        eigenvalues: (k,) Ritz values, from the requested end inwards; "BE" in ascending order.
        residuals: (k,) ||A v - lambda v||: the interval of this half-width around each value contains an eigenvalue.
        converged_each: (k,) whether the residual is at most tol times the eigenvalue, or rounding. The error is mostly
            far less, the residual's square over the gap; but the gap is not known before the search is over, and of
            1,080 searches that relied on it, 68 were off by more than tol (1 %), against 19 by the residual.
        verified: whether the search continued, after the pairs had converged, until no other eigenvalue
            was found (or the basis spans the space, or the whole matrix was solved). False where the budget ended it:
            the pairs may be converged, and yet not the outermost.
        eigenvectors: (P, k) orthonormal, or None where they were not requested.
        which: "LA" the largest, "SA" the smallest (most negative), "BE" from both ends.
        tol: the requested relative residual.
        seed: of the starting vector.
        cost: products.
        num_params: P.
    """

    eigenvalues: FloatArray
    residuals: FloatArray
    converged_each: Flags
    verified: bool
    eigenvectors: "Tensor | None"
    which: Which
    tol: float
    seed: int
    cost: Cost
    num_params: int

    @property
    def value(self) -> FloatArray:
        """The eigenvalues."""
        return self.eigenvalues

    @property
    def converged(self) -> bool:
        """Whether all pairs are converged, and the search is verified."""
        return self.verified and bool(self.converged_each.all())

    def interval(self) -> tuple[FloatArray, FloatArray]:
        """Return bounds (low, high) between which an eigenvalue lies with certainty, up to rounding."""
        return self.eigenvalues - self.residuals, self.eigenvalues + self.residuals

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each eigenvalue."""
        import pandas as pd

        columns = {"value": self.eigenvalues, "residual": self.residuals}
        frame = pd.DataFrame(columns).assign(converged=self.converged_each)
        frame.insert(0, "index", np.arange(len(frame)))
        return frame

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the eigenvalues with their bounds."""
        axes = axes_of(ax)
        axes.errorbar(np.arange(len(self.eigenvalues)), self.eigenvalues, yerr=self.residuals, fmt="o", ms=4)
        axes.set(xlabel="index", ylabel="eigenvalue")
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace(Sampled):
    """tr(A) and tr(A^2) of a symmetric matrix (P, P), along an axis of powers 1 and 2.

    Attributes:
        exact: (2,) the exact contribution of the basis to the two.
        vectors: (n, 5) of each vector on the complement of the basis: z'Az and |Az|^2, and half their
            variances and covariance: of the first, of both, of the second, which the first 32 vectors have. The two
            numbers are computed from the same vectors, so that they are not independent.
        basis: how many vectors were deflated, or P.
        rel_error: requested standard error of the trace, as a share of it.
        stopped: "accuracy", "budget", or "exact" where the basis spans the space.
        seed: of basis and vectors.
        num_params: P.
    """

    exact: FloatArray
    vectors: FloatArray
    basis: int
    rel_error: float
    stopped: str
    seed: int
    num_params: int

    over: ClassVar[str] = "vectors"

    @property
    def trace(self) -> Estimate:
        """tr(A)."""
        return self.estimates[0]

    @property
    def square(self) -> Estimate:
        """tr(A^2), the squared Frobenius norm."""
        return self.estimates[1]

    @property
    def captured(self) -> float:
        """The share of the trace that the basis holds; it may exceed 1 where the rest is negative."""
        return float(self.exact[0] / self.trace.value)

    @property
    def effective_rank(self) -> Estimate:
        """tr(A)^2 / tr(A^2), between 0 and P: the number of equal eigenvalues with both traces; linearised error."""
        first, second = self.trace.value, self.square.value
        if not second > 0:
            return Estimate(float("nan"), float("nan"), 1)
        value = first**2 / second
        a, b = 2 * first / second, -value / second
        return replace(mean_of_draws(self.vectors, a, b), value=value)

    @property
    def estimates(self) -> list[Estimate]:
        """Trace and trace of the square."""
        found = [mean_of_draws(self.vectors, 1.0, 0.0), mean_of_draws(self.vectors, 0.0, 1.0)]
        return [replace(each, value=each.value + float(more)) for each, more in zip(found, self.exact, strict=True)]

    @property
    def raw(self) -> list[FloatArray]:
        """What the vectors found."""
        return [self.vectors[:, 0], self.vectors[:, 1]]

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The powers."""
        return "power", np.array([1.0, 2.0])

    @property
    def converged(self) -> bool:
        """Whether the requested accuracy is reached."""
        return self.stopped != "budget"


def mean_of_draws(vectors: FloatArray, first: float, second: float) -> Estimate:
    """Return the mean of first z'Az + second |Az|^2 over all vectors; its variance is that of the pilot's.

    That is a mean of positive numbers: its degrees of freedom are those of Satterthwaite, and at least one each.
    """
    if not len(vectors):
        return Estimate(0.0, 0.0, 1)
    halves = vectors[:PILOT, 2:] @ np.array([first**2, 2 * first * second, second**2])
    half, spread = max(0.0, float(halves.mean())), float(halves.var(ddof=1))
    each = np.clip(2 * half**2 / spread, 1.0, MANY) if spread > 0 else MANY
    value = float((vectors[:, :2] @ np.array([first, second])).mean())
    return Estimate(value, float(np.sqrt(2 * half / len(vectors))), int(len(halves) * each))


@dataclass(frozen=True, eq=False, kw_only=True)
class SpectralDensity(Saved):
    """A quadrature of the eigenvalues' distribution for each of V random starts; its mean over starts is unbiased.

    Attributes:
        nodes: V arrays (m,) of Ritz values; m is the number of steps, or less where the basis broke down, and then the
            quadrature is exact.
        weights: V arrays (m,), squared first components of the Ritz vectors; each sums to one.
        seed: of the starts.
        cost: products.
        num_params: P; the density integrates to one, P times it counts eigenvalues.
        floor: magnitude below which an eigenvalue is zero up to rounding.
    """

    nodes: tuple[FloatArray, ...]
    weights: tuple[FloatArray, ...]
    seed: int
    cost: Cost
    num_params: int
    floor: float

    @classmethod
    def of_rules(cls, rules: Iterable[Iterable[FloatArray]], *, seed: int, num_params: int, floor: float) -> Self:
        """Return the density from nodes and weights of each start; its cost is a product for each node."""
        nodes, weights = zip(*rules, strict=True)
        cost = Cost(hvps=sum(map(len, nodes)))
        return cls(nodes=nodes, weights=weights, seed=seed, cost=cost, num_params=num_params, floor=floor)

    def mean(self, function: Callable[[FloatArray], FloatArray]) -> Estimate:
        """Return the mean of a function over the eigenvalues, tr f(A) / P, with its standard error over the starts.

        Args:
            function: from eigenvalues (m,) to numbers (m,); exact for each start if a polynomial of degree < 2 m.
        """
        return mean_of(self._each(function))

    def moment(self, power: int) -> Estimate:
        """Return tr(A^power) / P."""
        return self.mean(lambda values: values**power)

    @property
    def negative_share(self) -> Estimate:
        """The share of the eigenvalues that are negative beyond rounding; small ones count as much as large ones."""
        return self.mean(lambda values: (values < -self.floor).astype(np.float64))

    @property
    def negative_weight(self) -> Estimate:
        """The share of negative eigenvalues in the sum of all magnitudes: 0 in a convex bowl, 1/2 at a pure saddle."""
        return ratio_of(self._each(lambda v: np.maximum(-v, 0.0)), self._each(np.abs))

    def grid(self, num: int = 1000, sigma: float | None = None) -> FloatArray:
        """Return places (num,) that cover the nodes and four widths of the kernel beyond."""
        low, high = self._range()
        width = 4.0 * self.sigma(sigma)
        return np.linspace(low - width, high + width, num)

    def sigma(self, sigma: float | None = None) -> float:
        """Return the width of the kernel: one given, or 1 % of the nodes' range."""
        low, high = self._range()
        width = sigma if sigma is not None else 0.01 * (high - low) or max(self.floor, 1e-12)
        if not width > 0:
            raise UserError(f"The width sigma of the kernel must be > 0, got {sigma}.")
        return width

    def density(self, grid: npt.ArrayLike, sigma: float | None = None) -> FloatArray:
        """Return the density (G,) at places (G,), each eigenvalue blurred to a Gaussian; its integral is one.

        Args:
            grid: places.
            sigma: standard deviation of the Gaussian, in units of the eigenvalues.
        """
        return np.asarray(self._densities(grid, sigma).mean(axis=0))

    def band(
        self, grid: npt.ArrayLike, sigma: float | None = None, *, level: float = 0.95
    ) -> tuple[FloatArray, FloatArray]:
        """Return Student's t intervals (low, high) of the blurred density over the starts, at each place alone."""
        draws = self._densities(grid, sigma)
        count = len(draws)
        if count < 2:
            raise UserError("A band needs num_vectors of at least 2, since it is the spread over the starts.")
        half = stdtrit(count - 1, (1.0 + level) / 2.0) * draws.std(axis=0, ddof=1) / np.sqrt(count)
        return draws.mean(axis=0) - half, draws.mean(axis=0) + half

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each node of each start."""
        import pandas as pd

        starts = np.repeat(np.arange(len(self.nodes)), [len(nodes) for nodes in self.nodes])
        columns = {"start": starts, "node": np.concatenate(self.nodes), "weight": np.concatenate(self.weights)}
        return pd.DataFrame(columns)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the density on a logarithmic axis, and the 95 % band of its logarithm where there are several starts."""
        axes, places = axes_of(ax), self.grid()
        floor = 1e-3 / (self.num_params * self.sigma() * np.sqrt(2 * np.pi))  # a thousandth of one eigenvalue's peak
        shown = np.maximum(self.density(places), floor / 10)
        (line,) = axes.semilogy(places, shown)
        if len(self.nodes) > 1:
            low, high = self.band(places)  # often contains 0: hence the interval of the logarithm, by the delta method
            factor = np.exp((high - low) / 2 / shown)
            axes.fill_between(places, shown / factor, shown * factor, color=line.get_color(), alpha=0.25, linewidth=0)
        axes.set(xlabel="eigenvalue", ylabel="density", ylim=(floor, 10 * shown.max()))
        return axes

    def _each(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        return np.array([(w * function(n)).sum() for n, w in zip(self.nodes, self.weights, strict=True)])

    def _range(self) -> tuple[float, float]:
        return min(float(n.min()) for n in self.nodes), max(float(n.max()) for n in self.nodes)

    def _densities(self, grid: npt.ArrayLike, sigma: float | None) -> FloatArray:
        places, width = np.asarray(grid, dtype=np.float64), self.sigma(sigma)
        return np.stack([blur(places, n, w, sigma=width) for n, w in zip(self.nodes, self.weights, strict=True)])


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredSpectrum(Saved):
    """The spectrum of a Hessian as stored: extreme eigenvalues, numbers by sampling, and the spectral density.

    Attributes:
        eigenvalues: (k,).
        residuals: (k,) half-widths of intervals around each that contain an eigenvalue; NaN if the engine has none.
        states: (k,) "yes" where a pair has converged, "no", "not verified" where the budget ended the search, or
            "unknown" where the engine does not report it.
        numbers: estimates by name, of `NUMBERS`; the engine PyHessian gives the trace alone, without an error.
        stopped: why sampling of the trace ended; None where the engine does not report it.
        vectors: (n, 5) as in `Trace`; (0, 5) where the engine gives none.
        density: by flatlab's engine, else None.
        products: Hessian-vector products of all; None where the engine does not report it.
    """

    eigenvalues: FloatArray
    residuals: FloatArray
    states: tuple[str, ...]
    numbers: dict[str, Estimate]
    stopped: str | None
    vectors: FloatArray
    density: SpectralDensity | None
    products: int | None

    @classmethod
    def by_pyhessian(cls, eigenvalues: FloatArray, trace: float) -> Self:
        """Return what PyHessian measures: eigenvalues and trace, without errors."""
        return cls.from_arrays({"eigenvalues": eigenvalues}, {"trace": [trace, None, None]})

    @property
    def reached(self) -> str:
        """Whether the trace is as accurate as requested: "yes", "no" or "unknown"."""
        return {None: "unknown", "budget": "no"}.get(self.stopped, "yes")

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table: eigenvalues by `index`, within their residuals; then the numbers by sampling."""
        import pandas as pd

        frame = pd.DataFrame({"number": "eigenvalue", "index": np.arange(len(self.states)), "value": self.eigenvalues})
        low, high = self.eigenvalues - self.residuals, self.eigenvalues + self.residuals
        extremes = frame.assign(low=low, high=high, converged=self.states, over="residual")
        kept = {name: self.reached if name == "trace" else "" for name in self.numbers}
        rows = [{"number": n, "index": 0, **e.columns(), "converged": kept[n]} for n, e in self.numbers.items()]
        sampled = pd.DataFrame(rows).drop(columns="stderr").assign(over="vectors")
        return pd.concat([extremes, sampled], ignore_index=True)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the density, and the extreme eigenvalues as ticks below it; without a density these alone."""
        axes = axes_of(ax) if self.density is None else self.density.plot(ax)
        axes.plot(self.eigenvalues, np.zeros(len(self.eigenvalues)), "|", transform=axes.get_xaxis_transform())
        axes.set_xlabel("eigenvalue")
        return axes

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON."""
        if self.density is None:
            return {"eigenvalues": self.eigenvalues}, {"trace": [self.numbers["trace"].value, None, None]}
        codes = {state: code for code, state in STATES.items()}
        arrays = {"eigenvalues": self.eigenvalues, "residuals": self.residuals, "vectors": self.vectors}
        arrays |= {"converged": np.array([codes[state] for state in self.states])}
        for index, rule in enumerate(zip(self.density.nodes, self.density.weights, strict=True)):
            arrays |= dict(zip(_rule(index), rule, strict=True))
        facts: dict[str, Any] = {name: [e.value, e.stderr, e.freedom] for name, e in self.numbers.items()}
        facts |= {"num_params": self.density.num_params, "stopped": self.stopped, "products": self.products}
        return arrays, facts

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns; of the spec's fields only `seed` is used."""
        unknown = np.full(len(arrays["eigenvalues"]), np.nan)
        return cls(
            eigenvalues=arrays["eigenvalues"],
            residuals=arrays.get("residuals", unknown),
            states=tuple(STATES.get(code, "unknown") for code in arrays.get("converged", unknown).tolist()),
            numbers={name: _estimate(*facts[name]) for name in NUMBERS if name in facts},
            stopped=facts.get("stopped"),
            vectors=arrays.get("vectors", np.zeros((0, 5))),
            density=_density(arrays, facts) if "stopped" in facts else None,
            products=facts.get("products"),
        )


def _rule(index: int) -> tuple[str, str]:
    """Return the names of two arrays: nodes and weights of one start."""
    return f"nodes-{index:02d}", f"weights-{index:02d}"


def _estimate(value: float, stderr: float | None, freedom: int | None) -> Estimate:
    return Estimate(value, float("nan") if stderr is None else stderr, freedom or 1)


def _density(arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> SpectralDensity:
    count = sum(name.startswith("nodes-") for name in arrays)
    rules = [[arrays[name] for name in _rule(index)] for index in range(count)]
    floor = FLOOR * float(np.abs(arrays["eigenvalues"]).max())
    return SpectralDensity.of_rules(rules, seed=facts["seed"], num_params=facts["num_params"], floor=floor)
