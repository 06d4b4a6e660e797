"""LSQ, learned step size quantization: the step size is a parameter that is trained with the weights.

Sources: Esser et al. 2020 (arXiv 1902.08153), Eq. 1-3; QT-DoG (arXiv 2410.06020), Eq. 1-3: on weights only.
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
STARTS, COUNTS = ("batch", "one"), ("sample", "batch")  # of an input's step size


class Rounding(torch.autograd.Function):
    """x_q = s round(clip(x / s, -Q_N, Q_P)) with LSQ's gradients (Esser et al. 2020, Eq. 3).

    With r = x / s:

    - dx_q / dx is 1 where -Q_N < r < Q_P, else 0;
    - dx_q / ds is g (round(r) - r) there, else -g Q_N below and g Q_P above.

    Both are constants to autograd, so that second derivatives are those of the loss behind x_q. Nothing is kept for
    the backward pass but x and s, which live anyhow. torch's fused op (`_fake_quantize_learnable_per_channel_affine`)
    is not used: it counts as inside what lies up to half a step beyond the outer levels, has no second derivative, and
    is no faster on a CPU (benchmarks/quantizers.py).
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
        """Keep what the backward pass needs."""
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
    """Return the outermost numbers between two codes: what clamping to them leaves alone lies strictly inside."""
    ends = torch.tensor([low, high], dtype=dtype)
    first, last = torch.nextafter(ends, ends.flip(0)).tolist()
    return first, last


class Exponential(nn.Module):
    """The step size s = exp(t): positive whatever the optimizer does, and its updates are relative."""

    def forward(self, logarithm: Tensor) -> Tensor:
        """Return s."""
        return logarithm.exp()

    def right_inverse(self, scale: Tensor) -> Tensor:
        """Return t."""
        return scale.log()


class LSQ(nn.Module):
    """A parametrization of one weight by `Rounding`, with a learned step size s.

    Args:
        weight: the weight to quantize; it is looked at, not kept.
        bits: 2 to 16.
        granularity: "channel", a step size per output channel, or "tensor", one for all.
        grad_scale: N in g = 1 / sqrt(N Q_P): "shared" counts the weights that share a step size, as the paper
            does; "tensor" counts the whole weight, as lsq-net and QT-DoG's code do; "none" sets g = 1.
        signed: whether codes have both signs.
        log_scale: learn the logarithm of the step size.
        axis: of the output channels.

    Attributes:
        levels: the lowest and highest code (-Q_N, Q_P).
        scale: the step size s, shape (C, 1, ...), for `axis` 1 (1, C, 1, ...), or ().
        grad_factor: g.

    Raises:
        UserError: `bits` or an option is not known, or the weight holds a value that is not finite.
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
        """The parameter behind the step size: itself, or its logarithm."""
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
    """LSQ of a layer's input: one step size, set by the first batch that training shows (Esser et al. 2020, 2.1).

    Before that batch the input passes unchanged.

    Args:
        bits: 2 to 16.
        signed: whether codes have both signs; after a ReLU, unsigned ones waste none.
        start: of the step size: "batch", from the first batch, or "one", 1, as in JachinJiang/lsq-net.
        count: N in the gradient scale counts the features of one "sample", or of the whole "batch", as lsq-net does.

    Raises:
        UserError: an option is not known.
    """

    ready: Tensor
    rounded = True  # False: inputs are clipped to the range of the codes alone

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
        if not self.ready:  # a look at the device: each step waits for it
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
