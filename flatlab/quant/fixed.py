"""A weight with fixed codes, the result of post-training quantization."""

from typing import Self

import torch
from torch import Tensor, nn

from flatlab.quant.codebook import decode, initial_scale, levels


class Fixed(nn.Module):
    """A parametrization that returns the values of fixed codes, independent of the underlying weight.

    The original weight stays available as the latent one, so that quantization noise can be measured.

    Args:
        codes: integers, in the weight's shape.
        scale: step sizes, which broadcast to the codes.
        levels: the lowest and highest code.

    Attributes:
        levels: the lowest and highest code.
        scale: step sizes, a buffer.
    """

    grid = "uniform"
    scale: Tensor
    kept: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, levels: tuple[int, int]) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("kept", codes.short())  # 16 bits hold the codes of 16 bits
        self.register_buffer("scale", scale)

    @classmethod
    def empty(cls, weight: Tensor, *, bits: int, granularity: str, axis: int = 0) -> Self:
        """Return an instance of the right shapes with all codes 0, to be filled by `settle` or a state_dict."""
        span = levels(bits)
        scale = initial_scale(weight, span[1], granularity=granularity, axis=axis)
        return cls(torch.zeros_like(weight), scale, span)

    def settle(self, codes: Tensor, scale: Tensor) -> None:
        """Set codes and step sizes, of the same shapes as before."""
        self.kept.copy_(codes)
        self.scale.copy_(scale)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the quantized weight."""
        del weight
        return decode(self.kept, self.scale)

    def codes(self, weight: Tensor) -> Tensor:
        """Return the integer codes, int32."""
        del weight
        return self.kept.int()
