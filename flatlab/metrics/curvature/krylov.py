"""A Krylov basis that stays orthonormal: the basis of the spectrum, its density and the trace.

It uses only products with the operator. Each new vector is orthogonalised against all others, twice, so that there are
no spurious eigenvalues; the coefficients are the projection Q' A Q, also after restarts.
"""

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray
from flatlab.derivatives.operators import Curvature
from flatlab.seeds import generator

_BLOCK = 32  # columns of a whole matrix that share the graph of a batch
_SLAB = 1 << 16  # columns that are rotated together: a restart needs no second basis


def resolution(operator: Curvature | Tensor) -> float:
    """Return the share of the largest eigenvalue below which values are rounding errors: 1e-6 in float32."""
    return max(1e-10, 8 * torch.finfo(operator.dtype).eps)


def draw(operator: Curvature, kind: str, *names: object) -> Tensor:
    """Return random numbers (P,), "normal" or "signs" (-1 and 1), from the seed that the names determine."""
    rng = generator(*names)  # drawn on the host, so that each device gets the same
    if kind == "normal":
        return torch.randn(operator.shape[0], generator=rng).to(operator.device, operator.dtype)
    return (2 * torch.randint(2, (operator.shape[0],), generator=rng) - 1).to(operator.device, operator.dtype)


def matrix_of(operator: Curvature) -> Tensor:
    """Form the whole matrix (P, P) by P products, in float64 on the host."""
    eye = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    matrix = torch.cat([operator @ columns for columns in torch.split(eye, _BLOCK, dim=1)], dim=1).cpu().double()
    return (matrix + matrix.T) / 2


class Krylov:
    """An orthonormal basis Q and the projection T = Q' A Q, with A Q = Q T + beta q e' (e the last unit vector).

    Args:
        operator: A.
        start: (P,) the first direction.
        capacity: maximum number of vectors (P,) in the basis; no other of that size is stored between calls.
    """

    def __init__(self, operator: Curvature, start: Tensor, capacity: int) -> None:
        self.operator, self.products, self.size = operator, 0, 0
        self.basis = start.new_zeros((capacity, len(start)))
        self.projection: FloatArray = np.zeros((capacity, capacity))
        self._next, self.beta = start / torch.linalg.vector_norm(start), 0.0
        self._pairs: tuple[FloatArray, FloatArray] | None = None  # Ritz pairs, since the projection changed last

    @property
    def full(self) -> bool:
        """Whether the basis has as many vectors as its capacity."""
        return self.size == len(self.basis)

    @property
    def vectors(self) -> Tensor:
        """The basis so far, (size, P)."""
        return self.basis[: self.size]

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans the whole space, so that its Ritz pairs are exact."""
        return self.size == self.operator.shape[0]

    @property
    def broken(self) -> bool:
        """Whether the basis spans an invariant subspace, so that the remainder is only rounding."""
        scale = np.abs(self.projection).sum(axis=1).max()  # bounds |T| from above, without its eigenvalues
        return self.exhausted or not self.beta > resolution(self.operator) * scale

    def extend(self) -> None:
        """Add one vector; costs one product."""
        j = self.size
        self.basis[j] = self._next
        self.size += 1
        rest = self.operator @ self.basis[j]
        self.products += 1
        coefficients = self._orthogonalise(rest)
        self.projection[j, : j + 1] = self.projection[: j + 1, j] = coefficients
        self._pairs = None
        self.beta = float(torch.linalg.vector_norm(rest))
        self._next = rest / self.beta if self.beta > 0 else rest

    def ritz(self) -> tuple[FloatArray, FloatArray]:
        """Return Ritz values, ascending, and their coefficients in the basis, one column each."""
        if self._pairs is None:
            # By torch, whose threads the caller sets: NumPy's many take far longer on a busy machine.
            values, coefficients = torch.linalg.eigh(torch.from_numpy(self.projection[: self.size, : self.size]))
            self._pairs = values.numpy(), coefficients.numpy()
        return self._pairs

    def restart(self, coefficients: FloatArray, values: FloatArray) -> None:
        """Keep only some Ritz vectors, and the next direction (thick restart, Wu and Simon 2000)."""
        rotation = torch.from_numpy(coefficients.T.copy()).to(self.basis)
        for start in range(0, self.basis.shape[1], _SLAB):
            slab = self.basis[: self.size, start : start + _SLAB]
            self.basis[: len(values), start : start + _SLAB] = rotation @ slab
        self.size = len(values)
        self.projection[:] = 0.0
        self.projection[: self.size, : self.size] = np.diag(values)
        self._pairs = None

    def renew(self, direction: Tensor) -> None:
        """Continue in another direction after a breakdown; the projection has no entries between the two."""
        self._orthogonalise(direction)
        self._next, self.beta = direction / torch.linalg.vector_norm(direction), 0.0

    def _orthogonalise(self, vector: Tensor) -> FloatArray:
        """Orthogonalise a vector against the basis, in place; twice is enough (Giraud et al. 2005)."""
        total = np.zeros(self.size)
        for _ in range(2):
            part = self.vectors @ vector
            vector.addmv_(self.vectors.T, part, alpha=-1.0)
            total += part.double().cpu().numpy()
        return total
