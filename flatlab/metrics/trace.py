"""The trace of a landscape's curvature, with an interval: Hutchinson's probes on what a Krylov basis leaves over.

As in Hutch++ (Meyer et al. 2021), tr(A) = tr(Q'AQ) + tr((1 - QQ') A (1 - QQ')) for an orthonormal Q: the first term
is known exactly, and probes see only the second, so that outliers of the spectrum cost no variance. Q is a Krylov basis
here, since that finds outliers with half the products of a sketch and yields Q'AQ on the way. Its start and the probes
are drawn independently; otherwise the estimate would be biased.
"""

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flatlab.curvature.operators import Curvature, Hessian
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.krylov import Krylov, draw
from flatlab.metrics.lanczos import Spectrum
from flatlab.metrics.results import Cost, Estimate, FloatArray, Sampled, mean_of
from flatlab.seeds import base_seed

DEFLATE = 20  # products for the basis: as many vectors (P,) are held
BUDGET = 500  # products in all, where none is given: Hutchinson's probes for 2 % on a spectrum with outliers, twice
PILOT = 32  # probes whose spread says how many are needed, and which the interval rests on
BLOCK = 4  # probes that share the graph of a batch; as many products are held


@dataclass(frozen=True, eq=False, kw_only=True)
class Trace(Sampled):
    """tr(A) and tr(A^2) of a symmetric matrix (P, P), along an axis of powers 1 and 2.

    Attributes:
        exact: (2,) what the basis holds of the two, known without sampling.
        probes: (n, 2) what each probe finds in the rest: z'Az and |Az|^2 with z outside the basis. The spread of both
            rests on the same probes, so that the two numbers are not independent.
        basis: how many vectors were deflated.
        rel_error: standard error of the trace, as a share of it, that was asked for.
        stopped: "accuracy", "budget", or "exact" where the basis spans the space.
        seed: names basis and probes.
        num_params: P.
    """

    exact: FloatArray
    probes: FloatArray
    basis: int
    rel_error: float
    stopped: str
    seed: int
    num_params: int

    over: ClassVar[str] = "probes"

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
        """The share of the trace that the basis holds; it may pass 1 where the rest is negative."""
        return float(self.exact[0] / self.trace.value)

    @property
    def effective_rank(self) -> Estimate:
        """tr(A)^2 / tr(A^2), between 0 and P: how many equal eigenvalues would do; its error by linearisation."""
        first, second = self.trace.value, self.square.value
        if not second > 0:
            return Estimate(float("nan"), float("nan"), 1)
        value = first**2 / second
        slope = np.array([2 * first / second, -value / second])
        return Estimate(value, _stein(self.probes @ slope).stderr, self.square.freedom)

    @property
    def estimates(self) -> list[Estimate]:
        """Trace and trace of the square."""
        return [_stein(self.probes[:, power], float(self.exact[power])) for power in range(2)]

    @property
    def raw(self) -> list[FloatArray]:
        """What the probes found."""
        return [self.probes[:, 0], self.probes[:, 1]]

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The powers."""
        return "power", np.array([1.0, 2.0])

    @property
    def converged(self) -> bool:
        """Whether the accuracy that was asked for is reached."""
        return self.stopped != "budget"


def hessian_trace(
    landscape: Landscape | Curvature,
    *,
    rel_error: float = 0.02,
    budget: int = BUDGET,
    seed: int | torch.Generator = 0,
    deflate: "int | Spectrum | None" = None,
) -> Trace:
    """Estimate the trace of the Hessian of the mean loss, and of its square, until the trace is accurate enough.

    Nothing stops when it looks accurate, since luck looks like accuracy. The spread of 32 pilot probes says once how
    many probes are needed, and the interval rests on that spread and its 31 degrees of freedom, whatever the others
    say: then its level is exact for normal draws (Stein 1945). Where outliers are left, draws are skewed: of 95 %
    intervals 94 % held the truth by default in 400 repetitions on a spectrum with four outliers, 91 % undeflated.

    Args:
        landscape: whose Hessian; or an operator.
        rel_error: standard error of the trace over its value at which sampling stops.
        budget: products at most, those for the basis included.
        seed: names the start of the basis and, independently, the probes.
        deflate: how many products go into the basis, 20 by default and a third of the budget at most; 0 is plain
            Hutchinson; or a spectrum with its vectors, whose products are then used twice. Its seed may be this one,
            since its start and the probes are different draws.

    Raises:
        UserError: if a number does not do.
    """
    start, name = time.perf_counter(), base_seed(seed)
    operator = landscape if isinstance(landscape, Curvature) else Hessian(landscape)
    before = operator.products
    _check(rel_error, budget, deflate, operator)
    basis, exact = _deflate(operator, deflate, budget, name)
    probes, stopped = np.zeros((0, 2)), "exact"
    if len(basis) < operator.shape[0]:
        probes, stopped = _sample(
            operator, basis, float(exact[0]), (rel_error, budget - operator.products + before), name
        )
    return Trace(
        exact=exact,
        probes=probes,
        basis=len(basis),
        rel_error=rel_error,
        stopped=stopped,
        seed=name,
        num_params=operator.shape[0],
        cost=Cost(hvps=operator.products - before, seconds=time.perf_counter() - start),
    )


def _check(rel_error: float, budget: int, deflate: "int | Spectrum | None", operator: Curvature) -> None:
    if not rel_error >= 0:
        raise UserError(f"rel_error must not be negative, but is {rel_error}.")
    if budget < 2:
        raise UserError(f"The budget must be at least 2 products, since an interval needs a spread, but is {budget}.")
    if isinstance(deflate, Spectrum):
        if deflate.eigenvectors is None:
            raise UserError("The spectrum to deflate holds no vectors: make it by hessian_spectrum(..., vectors=True).")
        if len(deflate.eigenvectors) != operator.shape[0]:
            raise UserError(
                f"The spectrum to deflate is of {len(deflate.eigenvectors)} parameters, but the operator of"
                f" {operator.shape[0]}: take that of the same landscape."
            )
    elif deflate is not None and not 0 <= deflate <= budget - 2:
        raise UserError(f"deflate must lie between 0 and {budget - 2}, two less than the budget, but is {deflate}.")


def _deflate(
    operator: Curvature, deflate: "int | Spectrum | None", budget: int, seed: int
) -> tuple[Tensor, FloatArray]:
    """Return a basis (d, P) and what it holds of tr(A) and tr(A^2).

    Of the square it holds tr(A^2) - tr((1 - QQ') A^2 (1 - QQ')) = |A Q|^2, which for Ritz pairs is the sum of
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


def _sample(
    operator: Curvature, basis: Tensor, exact: float, limits: tuple[float, int], seed: int
) -> tuple[FloatArray, str]:
    """Return probes (n, 2) of what is outside the basis, and why they ended: by accuracy, or with the budget."""
    rel_error, affordable = limits
    pilot = _probe(operator, basis, range(min(PILOT, affordable)), seed)
    estimate = _stein(pilot[:, 0], exact)
    tolerance = rel_error * abs(estimate.value)
    need = 0.0 if not estimate.stderr else np.inf
    if tolerance > 0:
        need = len(pilot) * (estimate.stderr / tolerance) ** 2
    count = max(len(pilot), min(affordable, int(np.ceil(np.nan_to_num(need, posinf=affordable)))))
    probes = np.concatenate([pilot, _probe(operator, basis, range(len(pilot), count), seed)])
    return probes, "accuracy" if need <= count else "budget"


def _stein(draws: FloatArray, exact: float = 0.0) -> Estimate:
    """Return the mean of all draws (n,), with the spread of the pilot's alone, which chose n."""
    if not len(draws):
        return Estimate(exact, 0.0, 1)
    pilot = mean_of(draws[:PILOT])
    shrink = np.sqrt(min(PILOT, len(draws)) / len(draws))
    return Estimate(exact + float(draws.mean()), pilot.stderr * shrink, pilot.freedom)


def _probe(operator: Curvature, basis: Tensor, indices: range, seed: int) -> FloatArray:
    found = []
    for start in range(indices.start, indices.stop, BLOCK):
        block = range(start, min(start + BLOCK, indices.stop))
        z = torch.stack([draw(operator, "signs", "trace", "probe", seed, index) for index in block])
        for _ in range(2):
            z -= (z @ basis.T) @ basis
        products = (operator @ z.T).T
        found += [torch.stack([(z * products).sum(1), products.square().sum(1)], dim=1).double().cpu().numpy()]
    return np.concatenate(found) if found else np.zeros((0, 2))
