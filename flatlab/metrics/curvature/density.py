"""The density of a curvature's eigenvalues, by stochastic Lanczos quadrature.

Sources: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019.
"""

import time

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray, Report
from flatlab.derivatives.operators import Curvature, Hessian
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.krylov import Krylov, draw, resolution
from flatlab.results.estimate import Cost
from flatlab.results.spectrum import SpectralDensity
from flatlab.seeds import base_seed


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
        num_vectors: V random starting vectors of signs; at least two for an interval.
        steps: Lanczos steps m from each.
        seed: of the starts.
        reorthogonalise: store `steps` vectors (P,) and keep them orthonormal; else store three, whose loss of
            orthogonality replaces inner eigenvalues by copies of the outer ones (weights stay right).
        report: called with the products made and foreseen, after each start.

    Raises:
        UserError: if num_vectors or steps is below one.
    """
    begin, name = time.perf_counter(), base_seed(seed)
    if num_vectors < 1 or steps < 1:
        raise UserError(f"num_vectors and steps must be at least 1, got {num_vectors} and {steps}.")
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


def _orthonormal(operator: Curvature, start: Tensor, steps: int) -> FloatArray:
    krylov = Krylov(operator, start, steps)
    while not krylov.full:
        krylov.extend()
        if krylov.broken:  # further vectors would add spurious eigenvalues
            break
    return krylov.projection[: krylov.size, : krylov.size]


def _three_term(operator: Curvature, start: Tensor, steps: int) -> FloatArray:
    """Return the tridiagonal matrix of plain Lanczos, which stores three vectors."""
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
