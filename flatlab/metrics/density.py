"""The density of a curvature's eigenvalues, by stochastic Lanczos quadrature.

Sources: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import Tensor

from flatlab.curvature.operators import Curvature, Hessian
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.blur import blur
from flatlab.metrics.krylov import Krylov, draw, resolution
from flatlab.metrics.results import Cost, Estimate, FloatArray, Report, mean_of
from flatlab.seeds import base_seed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, kw_only=True)
class SpectralDensity:
    """A quadrature of the eigenvalues' distribution for each of V random starts; its mean over starts is unbiased.

    Attributes:
        nodes: V arrays (m,) of Ritz values; m is the number of steps, or less where the basis broke down, and then the
            quadrature is exact.
        weights: V arrays (m,), squared first components of the Ritz vectors; each sums to one.
        seed: names the starts.
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
            raise UserError(f"The width sigma of the kernel must be positive, but is {sigma}.")
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
        """Draw the density on a logarithmic axis, with its band where there are several starts."""
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if ax is None else ax
        places = self.grid()
        (line,) = axes.semilogy(places, np.maximum(self.density(places), 1e-9))
        if len(self.nodes) > 1:
            low, high = np.maximum(self.band(places), 1e-9)
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        return axes

    def _each(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        return np.array([(w * function(n)).sum() for n, w in zip(self.nodes, self.weights, strict=True)])

    def _range(self) -> tuple[float, float]:
        return min(float(n.min()) for n in self.nodes), max(float(n.max()) for n in self.nodes)

    def _densities(self, grid: npt.ArrayLike, sigma: float | None) -> FloatArray:
        places, width = np.asarray(grid, dtype=np.float64), self.sigma(sigma)
        return np.stack([blur(places, n, w, sigma=width) for n, w in zip(self.nodes, self.weights, strict=True)])


def spectral_density(
    landscape: Landscape | Curvature,
    *,
    num_vectors: int = 5,
    steps: int = 60,
    seed: int | torch.Generator = 0,
    reorthogonalise: bool = True,
    report: Report | None = None,
) -> SpectralDensity:
    """Estimate the density of the Hessian's eigenvalues; costs num_vectors * steps products.

    Args:
        landscape: whose Hessian; or an operator.
        num_vectors: V random starts of signs; two at least for an interval.
        steps: of Lanczos from each, m.
        seed: names the starts.
        reorthogonalise: hold `steps` vectors (P,) and keep them orthonormal; else hold three, whose loss of
            orthogonality puts copies of the outer eigenvalues in the place of inner ones (weights stay right).
        report: called with the products made and foreseen, after each start.

    Raises:
        UserError: if num_vectors or steps is below one.
    """
    begin, name = time.perf_counter(), base_seed(seed)
    if num_vectors < 1 or steps < 1:
        raise UserError(f"num_vectors and steps must be at least 1, but are {num_vectors} and {steps}.")
    operator = landscape if isinstance(landscape, Curvature) else Hessian(landscape)
    before, rules = operator.products, []
    for index in range(num_vectors):
        rules.append(quadrature(operator, name, index, steps=steps, reorthogonalise=reorthogonalise))
        if report:
            report(operator.products - before, num_vectors * steps)
    largest = max(float(np.abs(values).max()) for values, _ in rules)
    return SpectralDensity(
        nodes=tuple(values for values, _ in rules),
        weights=tuple(weights for _, weights in rules),
        seed=name,
        cost=Cost(hvps=operator.products - before, seconds=time.perf_counter() - begin),
        num_params=operator.shape[0],
        floor=resolution(operator) * largest,
    )


def quadrature(
    operator: Curvature, seed: int, index: int, *, steps: int, reorthogonalise: bool = True
) -> tuple[FloatArray, FloatArray]:
    """Return nodes (m,) and weights (m,) from one random start: a function of the seed and the start's number."""
    start = draw(operator, "signs", "density", seed, index)
    tridiagonal = (_orthonormal if reorthogonalise else _three_term)(operator, start, min(steps, operator.shape[0]))
    values, vectors = np.linalg.eigh(tridiagonal)
    return values, vectors[0] ** 2


def ratio_of(above: FloatArray, below: FloatArray) -> Estimate:
    """Return the ratio of two means over the same draws (K,), its standard error by linearisation."""
    if not below.mean():
        return Estimate(float("nan"), float("nan"), max(1, len(above) - 1))
    ratio = float(above.mean() / below.mean())
    spread = mean_of((above - ratio * below) / below.mean())
    return Estimate(ratio, spread.stderr, spread.freedom)


def _orthonormal(operator: Curvature, start: Tensor, steps: int) -> FloatArray:
    krylov = Krylov(operator, start, steps)
    while not krylov.full:
        krylov.extend()
        if krylov.broken:  # going on would add ghosts
            break
    return krylov.projection[: krylov.size, : krylov.size]


def _three_term(operator: Curvature, start: Tensor, steps: int) -> FloatArray:
    """Return the tridiagonal matrix of plain Lanczos, which holds three vectors."""
    alphas: list[float] = []
    betas: list[float] = []
    previous, current = torch.zeros_like(start), start / torch.linalg.vector_norm(start)
    for _ in range(steps):
        rest = operator @ current
        if betas:
            rest -= betas[-1] * previous
        alphas.append(float(current @ rest))
        rest -= alphas[-1] * current
        beta = float(torch.linalg.vector_norm(rest))
        scale = max(np.abs([*alphas, *betas]))
        if len(alphas) == steps or not beta > resolution(operator) * scale:
            break
        betas.append(beta)
        previous, current = current, rest / beta
    return np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
