"""Step rules: `step(closure) -> loss`, where the closure runs forward and backward on the step's batch.

Each call of the closure adds the gradient of the batch's loss at the current weights to `grad`, and returns that loss
(scalar, nats). A rule with two passes needs a closure that draws the same dropout mask in both, as the loop's does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatlab.models.networks import frozen_statistics
from flatlab.quant.attach import quantized_layers

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

    BatchNorm's running statistics are updated in the first pass only, at w.
    """

    def __init__(self, optimizer: Optimizer, network: nn.Module, moved: Iterable[nn.Parameter], *, rho: float) -> None:
        self.optimizer, self.network, self.rho = optimizer, network, rho
        self.moved = list(moved)

    def step(self, closure: Closure) -> Tensor:
        """Make one update; return the loss at the weights before it."""
        self.optimizer.zero_grad()
        loss = closure()
        grads = _gradients(self.moved)
        with frozen_statistics(self.network), _shifted(grads, self.rho / (_norm(grads.values()) + 1e-12)):
            self.optimizer.zero_grad()
            closure()
        self.optimizer.step()
        return loss


class SAGM:
    """Sharpness-aware gradient matching (Wang et al. 2023): the mean of the gradients g at w and g' at w + e.

    FOUND in Wang-pengfei/SAGM (69d4d9d, domainbed/sagm.py): e = (rho / (||g|| + 1e-12) - alpha) g, one norm over all
    that is moved; rho 0.05, alpha 0.001. There w + e is left by subtraction; here w is copied back, which is exact.
    There each pass draws a dropout mask of its own, so that g' - g contains its noise; here both passes of the loop
    have the same mask. Weight decay is the optimizer's: it is applied once, at w, and is part of neither g nor e.

    Args:
        optimizer: optimizer of all parameters.
        network: the network; BatchNorm's running statistics are updated in the first pass only.
        moved: the parameters that e perturbs; ||g|| is the norm over their gradients.
        rho: radius, absolute L2.
        alpha: factor of g that is subtracted from the ascent.
    """

    def __init__(
        self, optimizer: Optimizer, network: nn.Module, moved: Iterable[nn.Parameter], *, rho: float, alpha: float
    ) -> None:
        self.optimizer, self.network, self.rho, self.alpha = optimizer, network, rho, alpha
        self.moved = list(moved)

    def step(self, closure: Closure) -> Tensor:
        """Make one update; return the loss at the weights before it."""
        self.optimizer.zero_grad()
        loss = closure()
        task, moved = _gradients(self._parameters()), _gradients(self.moved)
        with frozen_statistics(self.network), _shifted(moved, self.rho / (_norm(moved.values()) + 1e-12) - self.alpha):
            self.optimizer.zero_grad()  # sets grad to None, so that the tensors of the first pass keep their values
            closure()
        self._join(task, _gradients(self._parameters()))
        self.optimizer.step()
        return loss

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _join(self, task: "Gradients", smooth: "Gradients") -> None:
        for parameter, grad in smooth.items():
            parameter.grad = 0.5 * task[parameter] + 0.5 * grad


class SAQ:
    """SAM at the quantized weight (Liu et al. 2021, arXiv 2111.12273): the gradient at Q(w) + e, applied at w.

    FOUND in zip-group/SAQ (594e9c7): e = rho g / ||g||, where g holds the gradients of the loss in Q(w), and those of
    the parameters that are not quantized; e is added to the output of the quantizer, so that it perturbs the loss even
    where it is too small to change a code. Before anything is quantized, the rule is SAM.

    Args:
        optimizer: optimizer of all parameters.
        network: the network whose quantized weights are perturbed.
        moved: the other parameters that e perturbs; latent weights are not among them.
        rho: radius, absolute L2.
    """

    def __init__(self, optimizer: Optimizer, network: nn.Module, moved: Iterable[nn.Parameter], *, rho: float) -> None:
        self.optimizer, self.network, self.rho = optimizer, network, rho
        self.moved = list(moved)
        self.quantizers = [quantized.quantizer for quantized in quantized_layers(network).values()]

    def step(self, closure: Closure) -> Tensor:
        """Make one update; return the loss at the weights before it."""
        self.optimizer.zero_grad()
        outputs: list[list[Tensor]] = [[] for _ in self.quantizers]  # one for each call: tied weights have several
        with self._behind([partial(_kept, found) for found in outputs]):
            loss = closure()
        grads = _gradients(self.moved)
        behind = [sum(each.grad for each in found if each.grad is not None) for found in outputs]
        factor = self.rho / (_norm([*grads.values(), *(g for g in behind if isinstance(g, Tensor))]) + 1e-12)
        shifts = [partial(torch.add, grad * factor) for grad in behind]
        with frozen_statistics(self.network), _shifted(grads, factor), self._behind(shifts):
            self.optimizer.zero_grad()
            closure()
        self.optimizer.step()
        return loss

    @contextmanager
    def _behind(self, acts: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Apply a function to the output of each quantizer."""
        with ExitStack() as stack:
            for quantizer, act in zip(self.quantizers, acts, strict=True):
                hook = quantizer.register_forward_hook(lambda _module, _inputs, output, act=act: act(output))
                stack.callback(hook.remove)
            yield


Gradients = dict[nn.Parameter, Tensor]


def _gradients(parameters: Iterable[nn.Parameter]) -> Gradients:
    return {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}


def _norm(grads: Iterable[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([grad.norm() for grad in grads]).norm()
    return norm


def _kept(found: list[Tensor], output: Tensor) -> Tensor:
    """Append a quantizer's output to `found`, and retain its gradient if it requires one."""
    if output.requires_grad:
        output.retain_grad()
    found.append(output)
    return output


@contextmanager
def _shifted(grads: Gradients, factor: Tensor) -> Iterator[None]:
    """Add `factor` times these gradients to their parameters; restore these from copies, which is exact."""
    home = {parameter: parameter.detach().clone() for parameter in grads}
    with torch.no_grad():
        for parameter, grad in grads.items():
            parameter.add_(grad * factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, start in home.items():
                parameter.copy_(start)
