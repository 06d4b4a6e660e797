"""The trace of a landscape's curvature, with an interval: Hutchinson's estimator on the complement of a Krylov basis.

As in Hutch++ (Meyer et al. 2021), tr(A) = tr(Q'AQ) + tr((1 - QQ') A (1 - QQ')) for an orthonormal Q: the first term
is known exactly, and only the second is estimated, so that outliers of the spectrum add no variance. Q is a Krylov
basis here, since that finds outliers with half the products of a sketch and also gives Q'AQ. Its start and the
vectors are drawn independently; otherwise the estimate would be biased.

Vectors z are uniform on the sphere of radius sqrt(P') in the P' dimensions outside of Q. With B the restriction of A,
z'Bz - tr(B) is a spherical harmonic of degree two, so that Var(z'Bz) = 2 E|Bz - (z'Bz / P') z|^2: the products also
give the variance, for any spectrum. If few large eigenvalues are left, draws are skewed, and their sample variance is
small whenever their mean is; this estimate is not, so that intervals cover with few vectors. For |Az|^2 = z'Cz, with
C = (1 - QQ') A^2 (1 - QQ'), the same needs A(Az), a second product, which is computed for the pilot's vectors.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray
from flatlab.derivatives.operators import Curvature, Hessian
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.krylov import Krylov, draw, matrix_of
from flatlab.results.estimate import Cost
from flatlab.results.spectrum import PILOT, Spectrum, Trace, mean_of_draws
from flatlab.seeds import base_seed

DEFLATE = 20  # products for the basis, which stores as many vectors (P,)
BUDGET = 500  # products, if not given: twice those that Hutchinson needs for 2 % on a spectrum with outliers
LEAST = 16  # vectors: from there on 95 % intervals contain the true value in 93 to 97 % of cases, for all spectra
WHOLE = DEFLATE + 2 * PILOT  # parameters up to which the whole matrix costs no more
COLUMNS = 5  # numbers stored of a vector
BLOCK = 4  # vectors that share the graph of a batch; as many products are stored


def hessian_trace(
    landscape: Landscape | Curvature,
    *,
    rel_error: float = 0.02,
    budget: int = BUDGET,
    seed: int | torch.Generator = 0,
    deflate: "int | Spectrum | None" = None,
) -> Trace:
    """Estimate the trace of the Hessian of the mean loss, and of its square, until the trace is accurate enough.

    A rule that stops as soon as the estimate looks accurate would bias it. Instead, 32 pilot vectors determine once the
    number needed, and the interval's width (Stein 1945). Of 95 % intervals, 93 to 97 % contained the true value
    from the smallest budget on, for flat, decaying and indefinite spectra and with outliers, deflated or not. Up to 84
    parameters the matrix is formed by P products, and nothing is sampled; also with more parameters, if sampling would
    cost more than that.

    Args:
        landscape: whose Hessian; or an operator.
        rel_error: standard error of the trace over its value at which sampling stops.
        budget: maximum number of products, those for the basis included: at least 48, or 32 more than `deflate`.
        seed: of the start of the basis and, independently, of the vectors.
        deflate: number of products for the basis, by default 20, but at most a third of the budget; 0 is plain
            Hutchinson; or a spectrum with its vectors, whose products are then used twice. It may have the same seed,
            since its start and the vectors are different draws.

    Raises:
        UserError: if a number is out of range.
    """
    start, name = time.perf_counter(), base_seed(seed)
    operator = landscape if isinstance(landscape, Curvature) else Hessian(landscape)
    before, size = operator.products, operator.shape[0]
    _check(rel_error, budget, deflate, operator)
    small = deflate is None and size <= min(budget, WHOLE)
    parts = _whole(operator) if small else _sampled(operator, deflate, rel_error=rel_error, budget=budget, seed=name)
    return Trace(
        **parts._asdict(),
        rel_error=rel_error,
        seed=name,
        num_params=size,
        cost=Cost(hvps=operator.products - before, seconds=time.perf_counter() - start),
    )


def packed(trace: Trace, *facts: float) -> FloatArray:
    """Return facts, then what was computed of a trace, as one vector, which is stored."""
    return np.concatenate([facts, trace.exact, trace.vectors.ravel()])


def unpacked(numbers: FloatArray, **facts: Any) -> Trace:
    """Return the trace from the vector after its facts, and the other fields."""
    return Trace(exact=numbers[:2], vectors=numbers[2:].reshape(-1, COLUMNS), **facts)


class _Parts(NamedTuple):
    """The exact part, the sampled part, the size of the basis, and why sampling ended."""

    exact: FloatArray
    vectors: FloatArray
    basis: int
    stopped: str


def _check(rel_error: float, budget: int, deflate: "int | Spectrum | None", operator: Curvature) -> None:
    if not rel_error >= 0:
        raise UserError(f"rel_error must be >= 0, got {rel_error}.")
    if isinstance(deflate, Spectrum):
        if deflate.eigenvectors is None:
            raise UserError("The spectrum to deflate has no vectors: make it by hessian_spectrum(..., vectors=True).")
        if len(deflate.eigenvectors) != operator.shape[0]:
            raise UserError(
                f"The spectrum to deflate has {len(deflate.eigenvectors)} parameters, but the operator"
                f" {operator.shape[0]}: use that of the same landscape."
            )
    elif deflate is not None and deflate < 0:
        raise UserError(f"deflate must be at least 0, got {deflate}.")
    least = _least(deflate, operator.shape[0])
    if budget < least:
        raise UserError(f"The budget must be at least {least} products, the least with valid intervals, got {budget}.")


def _least(deflate: "int | Spectrum | None", size: int) -> int:
    """Return the products of the smallest pilot and of the basis before it, or those of the whole matrix."""
    if deflate is None:
        return min(3 * LEAST, size)  # a third is for the basis
    held = deflate if isinstance(deflate, int) else 0
    return held if held >= size else held + 2 * LEAST


def _deflate(
    operator: Curvature, deflate: "int | Spectrum | None", budget: int, seed: int
) -> tuple[Tensor, FloatArray]:
    """Return a basis (d, P) and its parts of tr(A) and tr(A^2).

    That of the square is tr(A^2) - tr((1 - QQ') A^2 (1 - QQ')) = |A Q|^2, for Ritz pairs the sum of
    lambda^2 + residual^2, and for a Krylov basis |T|^2 + beta^2.
    """
    if isinstance(deflate, Spectrum):
        assert deflate.eigenvectors is not None
        values = deflate.eigenvalues
        return deflate.eigenvectors.T, np.array([values.sum(), (values**2 + deflate.residuals**2).sum()])
    size = min(DEFLATE, budget // 3) if deflate is None else deflate
    krylov = Krylov(operator, draw(operator, "normal", "trace", "basis", seed), min(size, operator.shape[0]))
    while not krylov.full:
        krylov.extend()
        if krylov.broken:
            break
    inside = krylov.projection[: krylov.size, : krylov.size]
    left = 0.0 if krylov.exhausted else krylov.beta
    return krylov.vectors, np.array([np.trace(inside), (inside**2).sum() + left**2])


def _whole(operator: Curvature) -> _Parts:
    matrix = matrix_of(operator)
    exact = np.array([float(matrix.trace()), float(matrix.square().sum())])
    return _Parts(exact, np.zeros((0, COLUMNS)), len(matrix), "exact")


def _sampled(
    operator: Curvature, deflate: "int | Spectrum | None", *, rel_error: float, budget: int, seed: int
) -> _Parts:
    before, size = operator.products, operator.shape[0]
    basis, exact = _deflate(operator, deflate, budget, seed)
    if len(basis) == size:
        return _Parts(exact, np.zeros((0, COLUMNS)), size, "exact")
    left = budget - (operator.products - before)
    pilot = _products_of(operator, basis, range(min(PILOT, left // 2)), seed, twice=True)
    left, more = left - 2 * len(pilot), _missing(pilot, float(exact[0]), rel_error)
    if deflate is None and size <= min(left, more):
        return _whole(operator)
    last = len(pilot) + int(min(left, more))
    vectors = np.concatenate([pilot, _products_of(operator, basis, range(len(pilot), last), seed)])
    return _Parts(exact, vectors, len(basis), "accuracy" if more <= left else "budget")


def _missing(pilot: FloatArray, exact: float, rel_error: float) -> float:
    """Return the number of vectors needed beyond the pilot's for the requested accuracy."""
    found = mean_of_draws(pilot, 1.0, 0.0)
    tolerance = rel_error * abs(exact + found.value)
    if not found.stderr:
        return 0.0
    return max(0.0, float(np.ceil(len(pilot) * ((found.stderr / tolerance) ** 2 - 1)))) if tolerance > 0 else np.inf


def _products_of(operator: Curvature, basis: Tensor, indices: range, seed: int, *, twice: bool = False) -> FloatArray:
    """Return the numbers of these vectors (n, 5); with `twice`, including the variance of the second number."""
    found, size = [np.zeros((0, COLUMNS))], operator.shape[0] - len(basis)
    for start in range(indices.start, indices.stop, BLOCK):
        block = range(start, min(start + BLOCK, indices.stop))
        z = _outside(torch.stack([draw(operator, "normal", "trace", "vector", seed, index) for index in block]), basis)
        z *= size**0.5 / torch.linalg.vector_norm(z, dim=1, keepdim=True)
        one = (operator @ z.T).T
        numbers = [(z * one).sum(1), one.square().sum(1)]
        slopes = [_outside(one, basis) - numbers[0][:, None] / size * z]
        if twice:
            slopes.append(_outside((operator @ one.T).T, basis) - numbers[1][:, None] / size * z)
        halves = [(slopes[0] * slopes[0]).sum(1), (slopes[0] * slopes[-1]).sum(1), (slopes[-1] * slopes[-1]).sum(1)]
        table = torch.stack([*numbers, *halves], dim=1).double().cpu().numpy()
        table[:, 3:] = table[:, 3:] if twice else np.nan
        found.append(table)
    return np.concatenate(found)


def _outside(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return rows orthogonalised against the basis; twice is enough."""
    for _ in range(2):
        vectors = vectors - (vectors @ basis.T) @ basis
    return vectors
