"""Integer codebooks: the levels of b bits, their step sizes, and the values of codes."""

import math

import torch
from torch import Tensor

from flatlab.errors import UserError, choose

BITS = range(2, 17)  # one signed bit has no positive level; beyond 16, float32 cannot distinguish the levels
GRANULARITIES = ("channel", "tensor")
SMALLEST_SCALE = 1e-8  # the step size of a channel of zeros, and the floor that keeps learned ones positive


def levels(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """Return the lowest and highest integer code (-Q_N, Q_P) of `bits` bits (LSQ, Esser et al. 2020, section 2).

    The range of signed codes is asymmetric: 7 bits give -64..63, as in QT-DoG's Eq. 1.

    Raises:
        UserError: `bits` is not an integer from 2 to 16.
    """
    if bits not in BITS:
        raise UserError(f"bits must be an integer from {BITS[0]} to {BITS[-1]}, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def shared_axes(weight: Tensor, granularity: str, axis: int) -> tuple[int, ...]:
    """Return the axes of a weight along which a step size is shared.

    Args:
        weight: any shape.
        granularity: "channel", all axes except that of the output channels, or "tensor", all axes.
        axis: axis of the output channels.
    """
    each = choose("granularity", granularity, GRANULARITIES) == "channel"
    return tuple(index for index in range(weight.dim()) if not (each and index == axis))


def initial_scale(weight: Tensor, high: int, *, granularity: str = "channel", axis: int = 0) -> Tensor:
    """Return the step size 2 mean|w| / sqrt(Q_P) (LSQ, Esser et al. 2020, section 2.1), in the weight's dtype.

    Args:
        weight: at least two axes.
        high: the highest code Q_P.
        granularity: "channel" gives one step size per output channel, of shape (C, 1, ...);
            "tensor" gives a single one, of shape ().
        axis: axis of the output channels; for 1, the shape is (1, C, 1, ...).
    """
    axes = shared_axes(weight, granularity, axis)
    size = weight.detach().abs().mean(axes, keepdim=len(axes) < weight.dim())
    return (2 * size / math.sqrt(high)).clamp(min=SMALLEST_SCALE)


def decode(codes: Tensor, scale: Tensor, grid: str = "uniform") -> Tensor:
    """Return the values of integer codes c, in the dtype of `scale`.

    Args:
        codes: any integer or floating dtype.
        scale: broadcasts to the codes.
        grid: "uniform", s c; or "power-of-two", s sign(c) 2^(|c| - 1) and 0 (INQ, Zhou et al. 2017, Eq. 1).
    """
    codes = codes.to(scale.dtype)
    if grid == "uniform":
        return codes * scale
    return codes.sign() * torch.exp2(codes.abs() - 1) * scale


def searched_scale(weight: Tensor, bits: int, *, granularity: str = "channel", axis: int = 0) -> Tensor:
    """Return the step size whose rounding error sum |w_q - w|^2.4 is least (OBC, Frantar and Alistarh 2022, quant.py).

    81 step sizes are tried, from 2 max|w| / (2^b - 1) down to a fifth of it; a channel of zeros gets `SMALLEST_SCALE`.

    Args:
        weight: at least two axes.
        bits: bits of a signed code.
        granularity: "channel", shape (C, 1, ...), or "tensor", shape ().
        axis: axis of the output channels.
    """
    low, high = levels(bits)
    axes = shared_axes(weight, granularity, axis)
    each = len(axes) < weight.dim()
    widest = weight.detach().abs().amax(axes, keepdim=each) * 2 / (high - low)
    best, least = widest.clamp(min=SMALLEST_SCALE), torch.full_like(widest, math.inf)
    for hundredths in range(100, 19, -1):
        scale = (widest * (hundredths / 100)).clamp(min=SMALLEST_SCALE)
        error = ((weight / scale).round().clamp(low, high) * scale - weight).abs().pow(2.4).sum(axes, keepdim=each)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse a weight with values that are not finite, for which no step size exists.

    Args:
        weight: any shape.
        name: name of the weight in the error.

    Raises:
        UserError: a value is not finite.
    """
    broken = int((~torch.isfinite(weight)).sum())
    if broken:
        raise UserError(
            f"{name} holds {broken} of {weight.numel()} values that are not finite, so it has no step size: "
            f"training has diverged before quantization"
        )
