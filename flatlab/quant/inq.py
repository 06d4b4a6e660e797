"""INQ, incremental network quantization: weights are quantized and frozen in stages, the largest ones first.

Source: Zhou et al. 2017 (arXiv 1702.03044), Eq. 1-4 and algorithm 1. QT-DoG compares with it in Table 4.
"""

import torch
from torch import Tensor, nn

from flatlab.errors import UserError, choose
from flatlab.quant.codebook import SMALLEST_SCALE, decode, levels, shared_axes

GRIDS = ("uniform", "power-of-two")


class INQ(nn.Module):
    """A parametrization that returns the quantized values of frozen weights, and the others unchanged.

    The grid is that of the weight at construction: uniform, 2^b - 1 levels from -max|w| to max|w|; or 0 and +-2^n for
    n2 <= n <= n1, with n1 = floor(log2(4 max|w| / 3)) and n2 = n1 + 1 - 2^(b-1) / 2 (Zhou et al., Eq. 1-3).

    Args:
        weight: the weight to quantize.
        bits: 2 to 16; at most 8 for powers of two, since smaller powers are below the range of float32.
        granularity: "channel" for max|w| of each output channel, "tensor" for that of the whole weight.
        grid: "uniform" or "power-of-two".
        axis: axis of the output channels.

    Attributes:
        levels: the lowest and highest code; codes of powers of two are sign(w) (n - n2 + 1).
        scale: the step size, or the smallest power 2^n2; a buffer that broadcasts to the weight.
        frozen: whether each weight is frozen, bool, in the weight's shape.

    Raises:
        UserError: an unknown option, or a number of bits out of its range.
    """

    scale: Tensor
    frozen: Tensor
    kept: Tensor

    def __init__(
        self, weight: Tensor, *, bits: int = 7, granularity: str = "channel", grid: str = "uniform", axis: int = 0
    ) -> None:
        super().__init__()
        self.grid = choose("grid", grid, GRIDS)
        high = levels(bits)[1] if grid == "uniform" else 2 ** (bits - 2)
        if grid == "power-of-two" and bits > 8:
            raise UserError(
                f"A grid of powers of two must have 2 to 8 bits, got {bits}: float32 has no smaller powers."
            )
        self.levels = (-high, high)
        axes = shared_axes(weight, granularity, axis)
        widest = weight.detach().abs().amax(axes, keepdim=len(axes) < weight.dim()).clamp(min=SMALLEST_SCALE)
        scale = widest / high if grid == "uniform" else torch.exp2((4 * widest / 3).log2().floor() - (high - 1))
        self.register_buffer("scale", scale)
        self.register_buffer("frozen", torch.zeros_like(weight, dtype=torch.bool))
        self.register_buffer("kept", torch.zeros_like(weight, dtype=torch.int16))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with its frozen part on the grid; only the rest gets gradients."""
        mixed = torch.where(self.frozen, decode(self.kept, self.scale, self.grid), weight)
        return torch.empty_like(weight).copy_(mixed)  # in the weight's strides: the order of a convolution's sums

    @torch.no_grad()
    def advance(self, weight: Tensor, share: float) -> None:
        """Quantize and freeze the largest weights until round(share * n) of n are frozen (Zhou et al., Eq. 4).

        Args:
            weight: the latent weight.
            share: 0 to 1.
        """
        wanted = round(share * weight.numel()) - int(self.frozen.sum())
        if wanted <= 0:
            return
        size = torch.where(self.frozen, -1.0, weight.abs()).reshape(-1)  # in logical order, independent of strides
        chosen = torch.zeros_like(size, dtype=torch.bool)
        chosen[torch.sort(size, descending=True, stable=True).indices[:wanted]] = True
        chosen = chosen.view(weight.shape)
        self.kept.copy_(torch.where(chosen, self._nearest(weight), self.kept))
        self.frozen |= chosen

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes, int32, in the weight's shape: fixed for frozen weights, else the nearest ones."""
        return torch.where(self.frozen, self.kept, self._nearest(weight.detach())).int()

    def _nearest(self, weight: Tensor) -> Tensor:
        """Return the code of the nearest level; |w| in [3/4 2^n, 3/2 2^n) is rounded to 2^n, |w| < 2^n2 / 2 to 0."""
        high = self.levels[1]
        if self.grid == "uniform":
            return (weight / self.scale).round().clamp(-high, high).short()
        ratio = weight.abs() / self.scale
        exponent = (4 * ratio / 3).log2().floor().clamp(0, high - 1)
        return (weight.sign() * torch.where(ratio < 0.5, 0, exponent + 1)).short()

    def extra_repr(self) -> str:
        """Return the codes' range and the grid, for printing."""
        return f"levels={self.levels[0]}..{self.levels[1]}, grid={self.grid}"
