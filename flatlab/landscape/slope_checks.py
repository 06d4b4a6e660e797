"""A check of first derivatives: whether autograd's gradient is the slope of the loss that is evaluated.

Slopes are central differences along random directions at two step sizes; a difference counts if both sizes give it.
The point is moved slightly first: a kink at the point itself (a bias that is zero behind a black border) has no slope
to compare with, and at a minimum the slope is zero.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from flatlab.errors import UserError
from flatlab.seeds import generator
from flatlab.tensors.flat import PIECE, length, sizes_of, split_like

DRAWS = 3  # the check must fail in two of three draws
AWAY = 0.03  # of each tensor's size: by which the point is moved
FINER = 4  # the larger step over the smaller one
SLACK = 2e-3  # of the gradient's length; a gradient that lacks a tenth of it is off by more in 49 of 50 draws
ROUNDINGS = 16  # of a loss of 1, or of the loss if it is larger
NEAR, JUMP = (8, 32), 1e-3  # roundings of each tensor's size by which the point is moved, and change of the loss


@dataclass(frozen=True)
class Slice:
    """A loss on some samples, as a function of the parameters, which are moved in place: that takes no copies.

    Attributes:
        names: of the parameters.
        tensors: the parameters.
        moving: restores them at its end.
        value: the mean loss where they are.
        gradient: its derivative by each parameter; None for a parameter that the graph does not contain.
    """

    names: Sequence[str]
    tensors: Sequence[Tensor]
    moving: Callable[[], AbstractContextManager[None]]
    value: Callable[[], float]
    gradient: Callable[[], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Slope:
    """The slope along a direction, in nats per step of each tensor's size: of the loss, and by autograd."""

    loss: float
    autograd: float
    slack: float  # differences up to this are not significant
    gradient: Sequence[Tensor | None]

    @property
    def agrees(self) -> bool:
        """Whether they differ by no more than rounding and curvature; also if one is NaN."""
        return not abs(self.loss - self.autograd) > self.slack


def check_slope(part: Slice) -> list[str]:
    """Return the parameters with a gradient of zero; refuse a gradient that is not the slope of the loss.

    If autograd returns a slope and the loss does not change at all, a rounding is differentiated straight through: its
    values are right, and the check of curvature refuses it. Costs a gradient and four values.

    Args:
        part: the loss on a stratified sample of the batches.

    Raises:
        UserError: with both slopes along the parameter in which they differ most.
    """
    first = _slope(part, 0)
    if not first.agrees and sum(not _slope(part, draw).agrees for draw in range(1, DRAWS)) >= DRAWS // 2:
        _refuse_false(part, first)
    pairs = zip(part.names, first.gradient, strict=True)
    return [name for name, slope in pairs if slope is None or not slope.count_nonzero()]


def jump(part: Slice) -> str:
    """Return by how much the loss jumps at the point itself, as a sentence; empty if it does not. Costs three values.

    A jump changes the loss as much where the point is moved by a quarter of the step; a slope or a curvature does not.
    """
    eps = torch.finfo(part.tensors[0].dtype).eps
    if eps > torch.finfo(torch.float32).eps:
        return ""  # such a step is not small
    with part.moving():
        here, rises, at = part.value(), list[float](), 0
        direction = _drawn(generator("slope", "jump"), part.tensors, sizes_of(part.tensors))
        for step in NEAR:
            _move(part.tensors, direction, (step - at) * eps)
            rises.append(part.value() - here)
            at = step
    first, second = map(abs, rises)
    if not (first > JUMP * (1 + abs(here)) and second < 3 * first):
        return ""
    return (
        f"The loss jumps at the point: it changes by {rises[0]:.2g} nats where the parameters move by"
        f" {NEAR[0] * eps:.0e} of their size, so that F at small radii is this jump, and curvature does not predict it"
        " (torch's orthogonal parametrization of a matrix that is not square does that: remove_parametrizations)."
    )


def _slope(part: Slice, draw: int, only: int | None = None, known: Slope | None = None) -> Slope:
    """Return both slopes along a random direction, or along its entries in one parameter (`only`)."""
    rng, sizes = generator("slope", "probe", draw), sizes_of(part.tensors)
    eps = torch.finfo(part.tensors[0].dtype).eps
    of_loss, of_autograd, floor = list[float](), list[float](), 0.0
    with part.moving():
        _move(part.tensors, _drawn(rng, part.tensors, sizes), AWAY)
        direction = _drawn(rng, part.tensors, sizes)
        slopes = known.gradient if known else [s if s is None else s.to_dense() for s in part.gradient()]
        for index, piece in enumerate(direction):
            if only not in (None, index):
                piece.zero_()
        for step in (eps ** (1 / 3), eps ** (1 / 3) / FINER):
            _move(part.tensors, direction, step)
            high = part.value()
            fallen = _move(part.tensors, direction, -2 * step, slopes)
            low = part.value()
            _move(part.tensors, direction, step)
            of_loss.append((high - low) / (2 * step))
            of_autograd.append(-fallen / (2 * step))
            floor = ROUNDINGS * eps * max(1.0, abs(high), abs(low)) / (2 * step)
    off = [one - other for one, other in zip(of_loss, of_autograd, strict=True)]
    norms = [0.0 if slope is None else size * float(length(slope)) for slope, size in zip(slopes, sizes, strict=True)]
    slack = SLACK * float(np.linalg.norm(norms)) + 10 * abs(off[0] - off[1]) + floor
    return Slope(of_loss[1], of_autograd[1], slack, slopes)


def _drawn(rng: Generator, tensors: Sequence[Tensor], sizes: Sequence[float]) -> list[Tensor]:
    """Return random steps of the sizes of the tensors."""
    noise = torch.randn(sum(tensor.numel() for tensor in tensors), generator=rng).to(tensors[0])
    steps = split_like(noise, tensors)
    for step, size in zip(steps, sizes, strict=True):
        step.mul_(size)
    return steps


@torch.no_grad()
def _move(
    tensors: Sequence[Tensor], steps: Sequence[Tensor], factor: float, slopes: Sequence[Tensor | None] = ()
) -> float:
    """Add steps to tensors in place; return, if slopes are given, their product in float64 with what was added."""
    risen = 0.0
    for index, (tensor, step) in enumerate(zip(tensors, steps, strict=True)):
        slope = slopes[index] if slopes else None
        if slope is None:
            tensor.add_(step, alpha=factor)
            continue
        for few in _pieces(tensor):
            before = tensor[few].to(torch.float64, copy=True)
            tensor[few] += factor * step[few]
            risen += float(((tensor[few].double() - before) * slope[few].double()).sum())
    return risen


def _pieces(tensor: Tensor) -> Sequence[Any]:
    """Return indices of parts of a tensor along its first axis."""
    if tensor.ndim == 0:
        return [...]
    rows = max(1, PIECE // max(1, tensor[:1].numel()))
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]


def _refuse_false(part: Slice, first: Slope) -> None:
    """Raise for the parameter in which the slopes differ most, unless the loss does not change along any of them."""
    each = [_slope(part, 0, only, first) for only in range(len(part.tensors))]
    false = [slope for slope in each if not slope.agrees and abs(slope.loss) > slope.slack]
    if not false and any(not slope.agrees for slope in each):
        return
    worst = max(false or each, key=lambda slope: abs(slope.loss - slope.autograd))
    name = part.names[each.index(worst)]
    raise UserError(
        f"Autograd's gradient is not the slope of the loss: along a random direction in {name!r} the loss rises by"
        f" {worst.loss:.4g} per step, but by {worst.autograd:.4g} by autograd, so that derivatives are wrong or missing"
        " (checkpoint(use_reentrant=True), detach(), a custom backward): correct that (use_reentrant=False), or measure"
        " only values with check=False."
    )
