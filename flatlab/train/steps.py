"""Step rules: `step(closure) -> loss`, where the closure runs forward and backward on the step's batch.

Each call of the closure adds the gradient of the same batch at the current weights, and returns the loss (scalar).
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatlab.models.networks import frozen_statistics

Closure = Callable[[], Tensor]


class Step(Protocol):
    """One update of the weights."""

    def step(self, closure: Closure) -> Tensor:
        """Make one update; return the loss at the weights before it."""


class Plain:
    """One gradient, one step of the optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Closure) -> Tensor:
        """Make one update; return the loss at the weights before it."""
        self.optimizer.zero_grad()
        loss = closure()
        self.optimizer.step()
        return loss


class SAM:
    """Sharpness-aware minimisation (Foret et al. 2021): the gradient at w + rho g/||g||, applied at w.

    The second pass leaves BatchNorm's running statistics alone: they belong to w.
    """

    def __init__(self, optimizer: Optimizer, network: nn.Module, moved: Iterable[nn.Parameter], *, rho: float) -> None:
        self.optimizer, self.network, self.rho = optimizer, network, rho
        self.moved = list(moved)  # all parameters but step sizes

    def step(self, closure: Closure) -> Tensor:
        """Make one update; return the loss at the weights before it."""
        self.optimizer.zero_grad()
        loss = closure()
        home = self._ascend()
        self.optimizer.zero_grad()
        with frozen_statistics(self.network):
            closure()
        with torch.no_grad():
            for parameter, start in home.items():
                parameter.copy_(start)  # copied, not subtracted: exact
        self.optimizer.step()
        return loss

    @torch.no_grad()
    def _ascend(self) -> dict[nn.Parameter, Tensor]:
        graded = [parameter for parameter in self.moved if parameter.grad is not None]
        grads = [parameter.grad for parameter in graded if parameter.grad is not None]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        home = {parameter: parameter.clone() for parameter in graded}
        for parameter, grad in zip(graded, grads, strict=True):
            parameter.add_(grad * (self.rho / (norm + 1e-12)))
        return home
