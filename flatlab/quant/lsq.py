"""LSQ, learned step size quantization: the step size is a parameter that is trained with the weights.

Sources: Esser et al. 2020 (arXiv 1902.08153), Eq. 1-3; QT-DoG (arXiv 2410.06020), Eq. 1-3: on weights only.
"""

import math

import torch
from torch import Tensor, nn

from flatlab.errors import UserError, choose
from flatlab.quant.codebook import initial_scale, levels, straight_through

GRAD_SCALES = ("shared", "tensor", "none")


class LSQ(nn.Module):
    """A parametrization of one weight: w_q = s round(clip(w / s, -Q_N, Q_P)), with a learned step size s.

    With r = w / s, the gradients are LSQ's (Esser et al. 2020, Eq. 3):

    - dw_q / dw is 1 where -Q_N < r < Q_P, else 0;
    - dw_q / ds is g (round(r) - r) there, else -g Q_N below and g Q_P above.

    Both are constants to autograd, so that second derivatives are those of the loss behind w_q.

    Args:
        weight: the weight to quantize, shape (C, ...); it is looked at, not kept.
        bits: 2 to 16.
        granularity: "channel", a step size per output channel, or "tensor", one for all.
        grad_scale: N in g = 1 / sqrt(N Q_P): "shared" counts the weights that share a step size, as the paper
            does; "tensor" counts the whole weight, as lsq-net and QT-DoG's code do; "none" sets g = 1.
        name: what an error calls the weight.

    Attributes:
        levels: the lowest and highest code (-Q_N, Q_P).
        scale: the step size s, shape (C, 1, ...) or ().
        grad_factor: g.

    Raises:
        UserError: `bits` or an option is not known, or the weight holds a value that is not finite.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        bits: int = 7,
        granularity: str = "channel",
        grad_scale: str = "shared",
        name: str = "weight",
    ) -> None:
        super().__init__()
        self.levels = levels(bits)
        broken = int((~torch.isfinite(weight)).sum())
        if broken:
            raise UserError(
                f"{name} holds {broken} of {weight.numel()} values that are not finite, so it has no step size: "
                f"training has diverged before quantization"
            )
        high = self.levels[1]
        self.scale = nn.Parameter(initial_scale(weight, high, granularity=granularity))
        sharing = {"shared": weight.numel() // self.scale.numel(), "tensor": weight.numel(), "none": 0}
        count = sharing[choose("gradient scale", grad_scale, GRAD_SCALES)]
        self.grad_factor = 1 / math.sqrt(count * high) if count else 1.0

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight, in the shape, dtype and memory format of `weight`."""
        ratio, codes, inside = self._place(weight)
        slope = self.grad_factor * torch.where(inside, codes - ratio, codes)
        tangent = torch.where(inside, weight, 0.0) + slope * self.scale
        return straight_through(codes * self.scale, tangent)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes of the weight, int32, in its shape."""
        return self._place(weight)[1].to(torch.int32)

    def _place(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return r = w / s, its code, and whether r lies strictly between the outer levels."""
        low, high = self.levels
        ratio = weight.detach() / self.scale.detach()
        return ratio, ratio.clamp(low, high).round(), (low < ratio) & (ratio < high)

    def extra_repr(self) -> str:
        """Return the codes' range and the number of step sizes, for printing."""
        return f"levels={self.levels[0]}..{self.levels[1]}, scales={self.scale.numel()}"
