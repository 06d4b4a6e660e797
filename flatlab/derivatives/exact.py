"""Operations whose second derivatives are wrong or missing in torch, replaced by equal ones."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatlab.derivatives.autograd import nodes_behind, twice_differentiable

# The second derivative of fused weight_norm treats the norms as constants; that of hardsigmoid is missing.
INEXACT = ("WeightNormInterfaceBackward", "HardsigmoidBackward")


def uses_inexact(outputs: Sequence[Tensor]) -> bool:
    """Return whether the graph of these outputs contains torch's fused weight_norm, of either kind, or hardsigmoid."""
    nodes = nodes_behind([leaf.grad_fn for leaf in outputs])
    return any(node.name().startswith(INEXACT) for node in nodes)


@contextmanager
def exact_derivatives(model: nn.Module, *, inexact: bool = True) -> Iterator[None]:
    """Compute a model's function inside the block by operations whose second derivatives are right.

    That is: attention by plain products; weight_norm and hardsigmoid from their definitions; embeddings with dense
    gradients; modules of torch.compile uncompiled, since compiled code has no second derivative.

    Args:
        model: is restored after the block.
        inexact: replace weight_norm and hardsigmoid, which makes each operation slower by some microseconds.
    """
    with ExitStack() as stack:
        stack.enter_context(twice_differentiable())
        stack.enter_context(_dense_embeddings(model))
        stack.enter_context(attributes_restored(model))
        if inexact:
            stack.enter_context(_Definitions())
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and the import would take seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Restore tensors that modules have as plain attributes, which a forward pass may replace.

    Such as `weight` under weight_norm by hooks (torch.nn.utils.weight_norm), which is that of the last pass.
    """
    held = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]
    try:
        yield
    finally:
        for module, name, value in held:
            if vars(module).get(name) is not value:
                setattr(module, name, value)  # not through vars: recurrent layers keep a second reference


class _Definitions(TorchFunctionMode):
    """Computes weight_norm as v g / |v| and hardsigmoid as a clamp, which can be differentiated any number of times."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        if func is F.hardsigmoid:
            return _hardsigmoid(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    result = F.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [axis for axis in range(v.ndim) if axis != dim]  # all of them for -1, as in torch
    squares = v.square().sum(others, keepdim=True)
    return v * (g.expand_as(squares) / squares.sqrt())


@contextmanager
def _dense_embeddings(model: nn.Module) -> Iterator[None]:
    sparse: list[Any] = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    for module in sparse:
        module.sparse = False
    try:
        yield
    finally:
        for module in sparse:
            module.sparse = True
