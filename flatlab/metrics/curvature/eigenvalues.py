"""Extreme eigenpairs of a landscape's curvature, each with a bound on its error: thick-restart Lanczos."""

import math
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray
from flatlab.derivatives.operators import Curvature, Hessian
from flatlab.errors import UserError, choose
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.krylov import Krylov, draw, matrix_of, resolution
from flatlab.results.estimate import Cost
from flatlab.results.spectrum import Flags, Spectrum, Which
from flatlab.seeds import base_seed

Order = np.ndarray[tuple[int], np.dtype[np.intp]]
_Found = tuple[FloatArray, FloatArray, Flags, Tensor | None]  # values, residuals, which are converged, vectors
EXTRA = 14  # basis vectors beyond k; with those of a product, at most k + 20 vectors (P,) are stored
BUDGET = 50  # products for each eigenpair, if no budget is given
SMALL = 2000  # parameters up to which the whole matrix is formed if the search has not ended within its budget
# Parameters for each pair up to which it is formed at once: its columns share graphs, so that each costs about 0.6
# products, and a search takes 5 to 8 products for each pair.
AT_ONCE = 8
# Products for which the search goes on after the wanted values have become steady, and after all their residuals are
# small as well: a number, or a share of the products before they were steady, if that is less. A small residual means
# that some eigenvalue is near: an eigenvector with a small component in the start is found late, but not much later
# than the others were. Of 7,056 searches (k = 1 to 20, tol 0.001 to 0.1, both ends; clusters, near copies, outliers of
# both signs) 21 end with an error above tol, and 30 where all wait for eight products after convergence, which takes as
# many products in all, and a sixth more for k = 1; without waiting one in 7 does.
STEADY, CONVERGED = (10, 0.7), (4, 0.4)
SAME = 0.1  # of the tolerance: change of a value that does not count


def hessian_spectrum(
    landscape: Landscape | Curvature,
    *,
    k: int = 10,
    which: Which = "LA",
    tol: float = 1e-3,
    budget: int | None = None,
    seed: int | torch.Generator = 0,
    vectors: bool = False,
) -> Spectrum:
    """Find extreme eigenpairs of the Hessian of the mean loss, by Lanczos with thick restarts (Wu and Simon 2000).

    It stores at most k + 20 vectors (P,), and may miss copies of a multiple eigenvalue. Up to 2,000 parameters the
    whole matrix is solved: at once if P is at most 8 k, else by the last P products, if the search has not ended.

    Args:
        landscape: whose Hessian; or an operator, such as GGN(landscape).
        k: number of eigenpairs.
        which: "LA" the largest, "SA" the smallest, "BE" half of them from each end (the odd one from the upper).
        tol: residual of each pair over its eigenvalue, as in SciPy's eigsh.
        budget: maximum number of products; by default 50 k, and P more if P is at most 2,000.
        seed: of the starting vector.
        vectors: keep the eigenvectors.

    Raises:
        UserError: if k is not between 1 and P, or `which` is unknown.
    """
    start, name = time.perf_counter(), base_seed(seed)
    choose("end of the spectrum", which, ("LA", "SA", "BE"))
    operator = landscape if isinstance(landscape, Curvature) else Hessian(landscape)
    before, size = operator.products, operator.shape[0]
    if not 1 <= k <= size:
        raise UserError(f"k must be between 1 and the {size} parameters, got {k}.")
    total = BUDGET * k + (size if size <= SMALL else 0) if budget is None else budget
    search, whole = _Search(operator, k, which, tol, name), size <= SMALL and total >= size
    ended = not (whole and size <= AT_ONCE * k) and search.run(total - size if whole else max(total, k))
    solve = search.found if ended or not whole else partial(_dense, operator, k, which)
    values, residuals, converged, kept = solve(vectors=vectors)
    return Spectrum(
        eigenvalues=values,
        residuals=residuals,
        converged_each=converged,
        verified=ended or whole,
        eigenvectors=kept,
        which=which,
        tol=tol,
        seed=name,
        cost=Cost(hvps=operator.products - before, seconds=time.perf_counter() - start),
        num_params=size,
    )


def _dense(operator: Curvature, k: int, which: Which, *, vectors: bool) -> _Found:
    """Form the whole matrix and solve it."""
    matrix = matrix_of(operator)
    values, basis = torch.linalg.eigh(matrix)
    order = torch.from_numpy(_ends(len(matrix), k, which).copy())
    values, basis = values[order], basis[:, order]
    residuals = torch.linalg.vector_norm(matrix @ basis - basis * values, dim=0)
    kept = basis.to(operator.device, operator.dtype) if vectors else None
    return values.numpy(), residuals.numpy(), np.ones(k, dtype=bool), kept


def _ends(size: int, count: int, which: Which) -> Order:
    """Return the positions of the wanted values among ascending ones, from the end inwards."""
    count = min(count, size)
    if which == "LA":
        return np.arange(size - 1, size - 1 - count, -1)
    if which == "SA":
        return np.arange(count)
    return np.concatenate([np.arange(count // 2), np.arange(size - (count - count // 2), size)])


class _Search:
    """A basis that is extended, restarted and, after a breakdown, continued in new directions."""

    def __init__(self, operator: Curvature, k: int, which: Which, tol: float, seed: int) -> None:
        self.operator, self.k, self.which, self.tol, self.seed = operator, k, which, tol, seed
        capacity = min(operator.shape[0], k + EXTRA)
        self.krylov = Krylov(operator, draw(operator, "normal", "lanczos", seed), capacity)
        self.fresh = 0  # new directions after breakdowns
        self.best: FloatArray = np.zeros(0)  # the wanted values at the last breakdown
        self.before: FloatArray = np.full(k, np.nan)  # the wanted values when they changed last
        self.steady = 0  # products for which they have not changed
        self.converged = -1  # of these, products after the first whose residuals were all small

    @property
    def need(self) -> int:
        """The number of pairs that must converge; more after a breakdown, since copies may be among them."""
        beyond = (2 if self.which == "BE" else 1) if self.fresh else 0
        return min(self.k + beyond, self.operator.shape[0])

    @property
    def order(self) -> Order:
        """Positions of the wanted Ritz values, from the end inwards."""
        return self._ends(self.k)

    def run(self, budget: int) -> bool:
        """Extend the basis until the wanted pairs have converged and stay so; return False if the budget is spent."""
        while self.krylov.products < budget:
            self.krylov.extend()
            if self.krylov.exhausted:
                return True
            if self.krylov.broken:
                if self._proved():
                    return True
                self._renew()
            elif self._settled():
                return True
            if self.krylov.full:
                self._restart()
        return False

    def found(self, *, vectors: bool) -> _Found:
        """Return the wanted pairs."""
        values, residuals = (each[self.order] for each in self.measured())
        converged = self.reached()[self.order]
        return values, residuals, converged, self.eigenvectors() if vectors else None  # last: it rotates the basis

    def measured(self) -> tuple[FloatArray, FloatArray]:
        """Return all Ritz values, ascending, with their residuals."""
        values, coefficients = self.krylov.ritz()
        return values, np.abs(self.krylov.beta * coefficients[-1]) * (not self.krylov.exhausted)

    def reached(self) -> Flags:
        """Return for each Ritz value whether it has the requested accuracy, or that of its dtype."""
        values, residuals = self.measured()
        return np.asarray(residuals <= self._allowed(values))

    def _allowed(self, values: FloatArray) -> FloatArray:
        return np.asarray(np.maximum(self.tol * np.abs(values), resolution(self.operator) * np.abs(values).max()))

    def _settled(self) -> bool:
        """Return whether the wanted pairs have converged, and their values have been the same for long enough."""
        if self.krylov.size < self.need:
            return False
        values = self.krylov.ritz()[0]
        now, allowed = values[self.order], self._allowed(values)[self.order]
        if np.all(np.abs(now - self.before) <= SAME * allowed):
            self.steady += 1
        else:
            self.before, self.steady = now, 0
        reached = self.reached()[self._ends(self.need)].all()
        self.converged = min(self.converged + 1, self.steady) if reached else -1
        before = self.krylov.products - self.steady
        waits = (min(most, math.ceil(share * before)) for most, share in (STEADY, CONVERGED))
        return all(waited >= wait for waited, wait in zip((self.steady, self.converged), waits, strict=True))

    def eigenvectors(self) -> Tensor:
        """Rotate the basis into the wanted Ritz vectors (P, k), in place: a copy would take k vectors more."""
        values, coefficients = self.krylov.ritz()
        self.krylov.restart(coefficients[:, self.order], values[self.order])
        return self.krylov.vectors.T

    def _ends(self, count: int) -> Order:
        return _ends(self.krylov.size, count, self.which)

    def _restart(self) -> None:
        # Half of the other vectors are kept, too: pairs that have nearly converged would have to be found again.
        self._keep(self.need + (len(self.krylov.basis) - self.need) // 2)

    def _proved(self) -> bool:
        """Return whether a new direction, extended until its own breakdown, has left the wanted values unchanged."""
        values = self.krylov.ritz()[0]
        before, self.best = self.best, values[self.order]
        scale = resolution(self.operator) * np.abs(values).max()
        return len(before) == self.k and bool(np.abs(self.best - before).max() <= 10 * scale)

    def _renew(self) -> None:
        """Keep the pairs found, which are exact, and continue in another direction."""
        self.fresh += 1
        self.before = np.full(self.k, np.nan)  # steady values say nothing about a direction that has just begun
        self._keep(self.k)
        self.krylov.renew(draw(self.operator, "normal", "lanczos", self.seed, self.fresh))

    def _keep(self, count: int) -> None:
        values, coefficients = self.krylov.ritz()
        kept = self._ends(min(count, len(self.krylov.basis) - 1))
        self.krylov.restart(coefficients[:, kept], values[kept])
