"""LSQ, learned step size quantization: the step size is a parameter that is trained with the weights.

Sources: Esser et al. 2020 (arXiv 1902.08153), Eq. 1-3; QT-DoG (arXiv 2410.06020), Eq. 1-3, of weights only.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatlab.errors import choose
from flatlab.quant.codebook import check_finite, initial_scale, levels

GRAD_SCALES = ("shared", "tensor", "none")
STARTS, COUNTS = ("batch", "one"), ("sample", "batch")  # initial step size of inputs; N of their gradient scale


class Rounding(torch.autograd.Function):
    """x_q = s round(clip(x / s, -Q_N, Q_P)) with LSQ's gradients (Esser et al. 2020, Eq. 3).

    With r = x / s:

    - dx_q / dx is 1 where -Q_N < r < Q_P, else 0;
    - dx_q / ds is g (round(r) - r) there, else -g Q_N below and g Q_P above.

    Both are constants to autograd, so that second derivatives are those of the loss as a function of x_q. Only x and s
    are saved for the backward pass. torch's fused op (`_fake_quantize_learnable_per_channel_affine`) is not used: it
    treats values up to half a step beyond the outer levels as inside, has no second derivative, and is no faster on a
    CPU (benchmarks/quantizers.py).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, scale: Tensor, span: tuple[int, int], factor: float) -> Tensor:
        """Return x_q.

        Args:
            values: x, any shape.
            scale: s, broadcasts to x.
            span: -Q_N and Q_P.
            factor: g.
        """
        del factor
        return (values / scale).clamp_(*span).round_().mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save x and s for the backward pass."""
        del output
        values, scale, ctx.span, ctx.factor = inputs
        ctx.save_for_backward(values, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients to x and s."""
        values, scale = (saved.detach() for saved in ctx.saved_tensors)
        ratio = values / scale
        codes = ratio.clamp(*_strictly(*ctx.span, ratio.dtype))
        inside = ratio.clone().eq_(codes)  # 1 and 0 in the ratio's dtype: booleans would be converted in each product
        to_values = grad * inside if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return to_values, None, None, None
        slope = codes.round_().sub_(ratio.mul_(inside))
        return to_values, (grad * slope).sum_to_size(scale.shape) * ctx.factor, None, None


@cache
def _strictly(low: int, high: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and largest floating-point number strictly between two codes."""
    ends = torch.tensor([low, high], dtype=dtype)
    first, last = torch.nextafter(ends, ends.flip(0)).tolist()
    return first, last


class Exponential(nn.Module):
    """The step size s = exp(t), which is always positive; updates of t change s by a factor."""

    def forward(self, logarithm: Tensor) -> Tensor:
        """Return s."""
        return logarithm.exp()

    def right_inverse(self, scale: Tensor) -> Tensor:
        """Return t."""
        return scale.log()


class LSQ(nn.Module):
    """A parametrization of one weight by `Rounding`, with a learned step size s.

    Args:
        weight: the weight to quantize; it determines the initial step size, and no reference to it is kept.
        bits: 2 to 16.
        granularity: "channel", a step size per output channel, or "tensor", a single one.
        grad_scale: N in g = 1 / sqrt(N Q_P): "shared" is the number of weights that share a step size, as in the
            paper; "tensor" is that of the whole weight, as in lsq-net and QT-DoG's code; "none" sets g = 1.
        signed: whether codes are signed.
        log_scale: whether the logarithm of the step size is learned instead.
        axis: axis of the output channels.

    Attributes:
        levels: the lowest and highest code (-Q_N, Q_P).
        scale: the step size s, shape (C, 1, ...), for `axis` 1 (1, C, 1, ...), or ().
        grad_factor: g.

    Raises:
        UserError: `bits` or another option is not valid, or a value of the weight is not finite.
    """

    grid = "uniform"

    def __init__(
        self,
        weight: Tensor,
        *,
        bits: int = 7,
        granularity: str = "channel",
        grad_scale: str = "shared",
        signed: bool = True,
        log_scale: bool = False,
        axis: int = 0,
    ) -> None:
        super().__init__()
        self.levels = levels(bits, signed=signed)
        check_finite(weight, "The weight")
        high = self.levels[1]
        self.scale = nn.Parameter(initial_scale(weight, high, granularity=granularity, axis=axis))
        sharing = {"shared": weight.numel() // self.scale.numel(), "tensor": weight.numel(), "none": 0}
        count = sharing[choose("gradient scale", grad_scale, GRAD_SCALES)]
        self.grad_factor = 1 / math.sqrt(count * high) if count else 1.0
        if log_scale:
            parametrize.register_parametrization(self, "scale", Exponential())

    @property
    def learned(self) -> nn.Parameter:
        """The parameter that is trained: the step size, or its logarithm."""
        return next(self.parameters())

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, in the shape, dtype and memory format of `weight`."""
        quantized: Tensor = Rounding.apply(weight, self.scale, self.levels, self.grad_factor)
        return quantized

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of the weight, int32, in its shape."""
        return (weight.detach() / self.scale.detach()).clamp(*self.levels).round().to(torch.int32)

    def extra_repr(self) -> str:
        """Return the codes' range and the number of step sizes, for printing."""
        return f"levels={self.levels[0]}..{self.levels[1]}, scales={self.learned.numel()}"


class Activations(nn.Module):
    """LSQ of a layer's input with one step size, initialised by the first training batch (Esser et al. 2020, 2.1).

    Before that batch, inputs are returned unchanged.

    Args:
        bits: 2 to 16.
        signed: whether codes are signed; unsigned ones suffice after a ReLU.
        start: initial step size: "batch", from the first batch, or "one", 1, as in JachinJiang/lsq-net.
        count: N in the gradient scale: the features of one "sample", or of the whole "batch", as in lsq-net.

    Raises:
        UserError: an option is not valid.
    """

    ready: Tensor
    rounded = True  # False: inputs are clipped to the range of the codes, and not rounded

    def __init__(self, *, bits: int = 8, signed: bool = False, start: str = "batch", count: str = "sample") -> None:
        super().__init__()
        self.levels = levels(bits, signed=signed)
        self.scale = nn.Parameter(torch.ones(()))
        self.batch = choose("count", count, COUNTS) == "batch"
        self.register_buffer("ready", torch.tensor(choose("start", start, STARTS) == "one"))

    @property
    def straight_through(self) -> bool:
        """Whether autograd's second derivatives are not those of the loss."""
        return self.rounded

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the quantized input, in its shape and dtype."""
        if not self.ready:  # on an accelerator, reading it waits for the device
            if not self.training:
                return inputs
            with torch.no_grad():
                self.scale.copy_(initial_scale(inputs, self.levels[1], granularity="tensor"))
                self.ready.fill_(True)
        if not self.rounded:
            low, high = self.levels
            return inputs.clamp(low * self.scale, high * self.scale)
        counted = inputs if self.batch else inputs[0]
        factor = 1 / math.sqrt(counted.numel() * self.levels[1])
        quantized: Tensor = Rounding.apply(inputs, self.scale, self.levels, factor)
        return quantized
