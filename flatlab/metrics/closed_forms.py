"""Losses whose value, Hessian and spectrum are known in closed form, for `flatlab selftest` and the tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab.landscape.landscape import Landscape
from flatlab.seeds import generator

CUTS = [29, 1, 10]  # of 40 samples: equally weighted batches would give wrong values
SAMPLES = sum(CUTS)
SPECTRUM = (30.0, 10.0, *(0.1 + 0.05 * k for k in range(37)), -0.5)  # outliers, a bulk, one negative


@dataclass(frozen=True)
class Golden:
    """A landscape with its exact values.

    Attributes:
        landscape: on a device, in a dtype.
        hessian: (P, P) in float64 on the CPU.
        value: the loss (nats) at points (N, P), in float64 on the CPU.
    """

    landscape: Landscape
    hessian: Tensor
    value: Callable[[Tensor], Tensor]

    @property
    def trace(self) -> float:
        """The trace of the Hessian."""
        return float(self.hessian.trace())

    @property
    def eigenvalues(self) -> Tensor:
        """Ascending."""
        values: Tensor = torch.linalg.eigvalsh(self.hessian)
        return values


class Quadratic(nn.Module):
    """L(w) = w'Hw / 2 + b'w, for each sample.

    Args:
        hessian: H (P, P).
        start: the point (P,); 0 if not given.
        slope: b (P,); 0 if not given.
    """

    def __init__(self, hessian: Tensor, start: Tensor | None = None, slope: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(hessian[0]) if start is None else start.clone())
        self.register_buffer("hessian", hessian)
        self.register_buffer("slope", torch.zeros_like(hessian[0]) if slope is None else slope)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the value, once for each sample."""
        curvature: Any = self.hessian
        slope: Any = self.slope
        value: Tensor = 0.5 * self.w @ curvature @ self.w + slope @ self.w
        return value + 0 * inputs


def rotated(eigenvalues: Tensor, draw: Tensor) -> Tensor:
    """Return a symmetric matrix (P, P) with these eigenvalues (P,), in the basis that a random draw (P, P) spans."""
    basis = torch.linalg.qr(draw)[0]
    matrix: Tensor = basis @ torch.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def quadratic(where: Any, spectrum: tuple[float, ...] = SPECTRUM) -> Golden:
    """A quadratic with this spectrum in a random basis, at its critical point."""
    size = len(spectrum)
    hessian = rotated(torch.tensor(spectrum, dtype=torch.float64), _normal("quadratic", size, size))
    data = [(torch.zeros(2).to(**where), torch.zeros(2).to(**where))]
    landscape = Landscape(Quadratic(hessian).to(**where).eval(), data, lambda outputs, targets: outputs)
    return Golden(landscape, hessian, lambda w: 0.5 * ((w @ hessian) * w).sum(1))


def softmax_regression(where: Any) -> Golden:
    """A linear classifier in uneven batches: H = mean (diag p - p p') kron x x' (Boehning 1992)."""
    x, y, w = _normal("softmax x", SAMPLES, 4), torch.arange(SAMPLES) % 3, _normal("softmax w", 3, 4)
    p = (x @ w.T).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    hessian = torch.einsum("nij,nk,nl->ikjl", middle, x, x).reshape(12, 12) / SAMPLES

    def value(points: Tensor) -> Tensor:
        logits = torch.einsum("nk,pck->pnc", x, points.reshape(-1, 3, 4))
        return (logits.logsumexp(2) - logits[:, torch.arange(SAMPLES), y]).mean(1)

    return Golden(_landscape([w], x, y, F.cross_entropy, where), hessian, value)


def linear_gaussian(where: Any) -> Golden:
    """Least squares in uneven batches: L = mean (y - w'x)^2 / 2, H = X'X / n, at a point that is not a minimum."""
    x, w = _normal("gaussian x", SAMPLES, 6), _normal("gaussian w", 1, 6)
    y = x @ _normal("gaussian truth", 6, 1) + 0.3 * _normal("gaussian noise", SAMPLES, 1)
    loss = half_square
    hessian = x.T @ x / SAMPLES
    return Golden(
        _landscape([w], x, y, loss, where), hessian, lambda points: 0.5 * (points @ x.T - y.T).square().mean(1)
    )


def deep_linear(where: Any) -> Golden:
    """Two linear layers, L = mean |W2 W1 x - y|^2 / 2: not convex, with a Hessian in closed form."""
    x = _normal("deep x", SAMPLES, 4)
    first, second = _normal("deep 1", 3, 4) / 2, _normal("deep 2", 2, 3)
    y = x @ _normal("deep truth", 4, 2)
    moment = x.T @ x / SAMPLES
    slope = (x @ (second @ first).T - y).T @ x / SAMPLES  # (2, 4)
    # By W1: W2'W2 kron S; by W2: I kron W1 S W1'; across: both factors once, and the slope.
    cross = torch.einsum("ai,jl,lk->ikaj", second, first, moment) + torch.einsum("ij,ak->ikaj", torch.eye(3), slope)
    upper = torch.kron(second.T @ second, moment)
    lower = torch.kron(torch.eye(2, dtype=x.dtype), first @ moment @ first.T)
    across = cross.reshape(12, 6)
    hessian = torch.cat([torch.cat([upper, across], 1), torch.cat([across.T, lower], 1)])

    def value(points: Tensor) -> Tensor:
        one, two = points[:, :12].reshape(-1, 3, 4), points[:, 12:].reshape(-1, 2, 3)
        return 0.5 * (torch.einsum("pai,pik,nk->pna", two, one, x) - y).square().sum(2).mean(1)

    return Golden(_landscape([first, second], x, y, half_square, where), hessian, value)


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared distance of each sample (n,)."""
    distance: Tensor = (outputs - targets).square().sum(1)
    return 0.5 * distance


def _landscape(
    weights: list[Tensor], x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor], where: Any
) -> Landscape:
    """Return the landscape of linear layers with these weights, in batches of uneven sizes."""
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.float64) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight.data.copy_(w)
    targets = y.to(where["device"]) if not y.is_floating_point() else y.to(**where)
    batches = list(zip(torch.split(x.to(**where), CUTS), torch.split(targets, CUTS), strict=True))
    return Landscape(nn.Sequential(*layers).to(**where).eval(), batches, loss)


def _normal(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("golden", name), dtype=torch.float64)
