"""A check of first derivatives: whether autograd's gradient is the slope of the loss that is evaluated.

Slopes are central differences along random directions at two step sizes; a difference counts if both sizes give it.
The point is moved slightly first: a kink at the point itself (a bias that is zero behind a black border) has no slope
to compare with, and at a minimum the slope is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatlab.errors import UserError
from flatlab.seeds import generator
from flatlab.tensors.flat import flatten, scales_of, split_like

DRAWS = 3  # the check must fail in two of three draws
AWAY = 0.03  # of each tensor's size: by which the point is moved
FINER = 4  # the larger step over the smaller one
SLACK = 2e-3  # of the gradient's length; a gradient that lacks a tenth of it is off by more in 49 of 50 draws
ROUNDINGS = 16  # of a loss of 1, or of the loss if it is larger


@dataclass(frozen=True)
class Slice:
    """A loss on some samples, as a function of flat vectors (P,).

    Attributes:
        names: of the parameters.
        tensors: the parameters.
        value: the mean loss.
        gradient: its derivative by each parameter; None for a parameter that the graph does not contain.
    """

    names: Sequence[str]
    tensors: Sequence[Tensor]
    value: Callable[[Tensor], float]
    gradient: Callable[[Tensor], Sequence[Tensor | None]]


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


def _slope(part: Slice, draw: int, only: int | None = None, known: Slope | None = None) -> Slope:
    """Return both slopes along a random direction, or along its entries in one parameter (`only`)."""
    rng = generator("slope", "probe", draw)
    scales = scales_of(part.tensors)
    point = flatten(part.tensors)
    away, direction = (scales * torch.randn(len(scales), generator=rng).to(scales) for _ in range(2))
    here = point + AWAY * away
    slopes = known.gradient if known else part.gradient(here)
    gradient = flatten(torch.zeros_like(t) if s is None else s for s, t in zip(slopes, part.tensors, strict=True))
    gradient = gradient.double()
    if only is not None:
        pieces = split_like(direction, part.tensors)
        direction = flatten(piece if index == only else torch.zeros_like(piece) for index, piece in enumerate(pieces))
    eps = torch.finfo(point.dtype).eps
    steps = eps ** (1 / 3), eps ** (1 / 3) / FINER
    of_loss, of_autograd, floor = list[float](), list[float](), 0.0
    for step in steps:
        ends = here + step * direction, here - step * direction
        high, low = (part.value(end) for end in ends)
        of_loss.append((high - low) / (2 * step))
        of_autograd.append(float(gradient @ (ends[0].to(gradient) - ends[1].to(gradient))) / (2 * step))
        floor = ROUNDINGS * eps * max(1.0, abs(high), abs(low)) / (2 * step)
    off = [one - other for one, other in zip(of_loss, of_autograd, strict=True)]
    slack = SLACK * float((gradient * scales.to(gradient)).norm()) + 10 * abs(off[0] - off[1]) + floor
    return Slope(of_loss[1], of_autograd[1], slack, slopes)


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
