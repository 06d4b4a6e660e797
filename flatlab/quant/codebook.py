"""Integer codebooks: the levels of b bits, the step size to begin with, and rounding that gradients pass through."""

import math

from torch import Tensor

from flatlab.errors import UserError, choose

BITS = range(2, 17)  # one signed bit has no positive level; beyond 16, float32 cannot tell the levels apart
GRANULARITIES = ("channel", "tensor")
SMALLEST_SCALE = 1e-8  # the step size of a channel of zeros, and the floor that keeps learned ones positive


def levels(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """Return the lowest and highest integer code (-Q_N, Q_P) of `bits` bits (LSQ, Esser et al. 2020, section 2).

    Signed codes reach one further down than up: 7 bits give -64..63, as in QT-DoG's Eq. 1.

    Raises:
        UserError: `bits` is not a whole number from 2 to 16.
    """
    if bits not in BITS:
        raise UserError(f"bits must be {BITS[0]} to {BITS[-1]}, not {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def initial_scale(weight: Tensor, high: int, *, granularity: str = "channel") -> Tensor:
    """Return the step size 2 mean|w| / sqrt(Q_P) (LSQ, Esser et al. 2020, section 2.1), in the weight's dtype.

    Args:
        weight: shape (C, ...), output channels first, at least two axes.
        high: the highest code Q_P.
        granularity: "channel" gives one step size per output channel, of shape (C, 1, ...);
            "tensor" gives a single one, of shape ().
    """
    granularity = choose("granularity", granularity, GRANULARITIES)
    axes = range(1, weight.dim()) if granularity == "channel" else range(weight.dim())
    size = weight.detach().abs().mean(tuple(axes), keepdim=granularity == "channel")
    return (2 * size / math.sqrt(high)).clamp(min=SMALLEST_SCALE)


def straight_through(value: Tensor, tangent: Tensor) -> Tensor:
    """Return `value`, to the bit, with the gradients of `tangent` (the straight-through estimator).

    The added difference is a zero, exactly, and made of plain operations: it can be differentiated twice.
    """
    return value.detach() + (tangent - tangent.detach())
