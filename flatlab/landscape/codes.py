"""Neighbours of a point on the quantization grid: random weights moved by one code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.seeds import generator
from flatlab.tensors.flat import flatten


@dataclass(frozen=True)
class Neighbours:
    """What each parameter changes by at the next code; 0 where there is none, or the parameter is not quantized.

    Attributes:
        down: (P,) at the next code down.
        up: (P,) at the next code up.
        square: sum over the parameters of the mean square of a move.
    """

    down: Tensor
    up: Tensor
    square: float

    @classmethod
    def of(cls, landscape: Landscape, named: Mapping[str, tuple[Tensor, Tensor]]) -> Self:
        """Return the neighbours of a landscape's point.

        Args:
            landscape: around the weights on the grid.
            named: changes (down, up) by the names of parameters; those that do not vary in the landscape are left out.

        Raises:
            UserError: if no parameter of the landscape can move, or a shape is another.
        """
        if not isinstance(named, Mapping):
            raise UserError("The neighbours must be what `code_neighbours(network)` returns, by the names of weights.")
        tensors = {name: named.get(name, (torch.zeros_like(each),) * 2) for name, each in landscape.named.items()}
        for name, each in landscape.named.items():
            if tensors[name][0].shape != each.shape:
                raise UserError(
                    f"{name} has the shape {tuple(each.shape)}, and its neighbours {tuple(tensors[name][0].shape)}:"
                    " take both from one network."
                )
        down, up = (landscape.as_point(flatten(pair[side] for pair in tensors.values())) for side in (0, 1))
        sides = (down != 0).to(down) + (up != 0).to(down)
        squares = (down.square() + up.square()) / sides.clamp(min=1)
        square = float(squares.sum(dtype=torch.float64))
        if not square > 0:
            raise UserError(
                "No parameter of the landscape has a neighbour on a grid: let quantized weights vary"
                f" ({', '.join(list(named)[:3])}), as `bake` leaves them."
            )
        return cls(down, up, square)

    def radius(self, share: float) -> float:
        """Return the root mean square length of moves of a share of the weights."""
        return float((share * self.square) ** 0.5)

    def shares(self, radii: FloatArray) -> FloatArray:
        """Return the share of the weights that moves at each radius (R,), p = gamma^2 / sum of squares.

        Raises:
            UserError: if it exceeds one.
        """
        longest = self.radius(1.0)
        if (radii > longest * (1 + 1e-6)).any():
            raise UserError(
                f"radii must be at most {longest:.4g} on the grid, where every weight moves by one code, got"
                f" {radii.max():.4g}."
            )
        return np.minimum(radii**2 / self.square, 1.0)

    def moves(self, share: float, seed: int, k: int) -> tuple[Tensor, Tensor]:
        """Return move k (P,), and the same weights moved to their other side, if they have one.

        Each weight moves with probability `share`, to a side at random, and at an end of its range inwards. Moves of
        equal index are nested: those at a larger share contain those at a smaller one.
        """
        rng = generator("codes", seed, k)
        chosen, upward = (torch.rand(len(self.up), generator=rng).to(self.up.device) < p for p in (share, 0.5))
        one, other = torch.where(upward, self.up, self.down), torch.where(upward, self.down, self.up)
        zero = torch.zeros_like(one)
        return (
            torch.where(chosen, torch.where(one != 0, one, other), zero),
            torch.where(chosen, torch.where(other != 0, other, one), zero),
        )
