"""A running mean of weights, and the saved state of an observer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Saved = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON facts, for resuming


@dataclass
class Mean:
    """The running mean of weights; integer entries are those of the last set."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    count: float = 0

    @torch.no_grad()
    def add(self, weights: Weights, count: float = 1) -> None:
        """Add one set of weights, or the mean of `count` sets; or one that weighs `count`."""
        self.count += count
        for name, value in weights.items():
            if self.count == count or not value.is_floating_point():
                self.tensors[name] = value.detach().clone()
            else:
                self.tensors[name].lerp_(value, count / self.count)

    def copy(self) -> "Mean":
        """Return a mean with copies of the tensors."""
        return Mean({name: value.clone() for name, value in self.tensors.items()}, self.count)
