"""Rescalings of layers that leave a network's function unchanged, found in its graph (torch.fx).

A convolution can be scaled by any factor against the BatchNorm behind it, and two layers against each other if
everything between them is positively homogeneous, f(c x) = c f(x) for c > 0, as ReLU is (Dinh et al. 2017, section 5).
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from flatlab.errors import UserError, reason
from flatlab.results.scale_audit import By, Pair, Refusal
from flatlab.seeds import generator

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PASSING: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
FUNCTIONS = {F.relu, F.leaky_relu, torch.relu, torch.flatten, F.dropout, F.max_pool2d, F.avg_pool2d}
FUNCTIONS |= {F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.max_pool2d}
METHODS = {"relu", "relu_", "flatten", "contiguous"}
BENT = {"ReLU6": "it is cut off at 6", "Hardtanh": "it is cut off", "LayerNorm": "it divides by the scale itself"}


def find_pairs(model: nn.Module) -> tuple[list[Pair], list[Refusal]]:
    """Return the pairs of a network that can be rescaled, and the layers that cannot, with reasons.

    Args:
        model: in eval mode, plain weights.

    Raises:
        UserError: if torch.fx cannot trace the model.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            graph = fx.Tracer().trace(model)
    except Exception as error:  # a model's code may fail in any way on a proxy
        raise UserError(
            f"The graph of {type(model).__name__} cannot be followed by torch.fx, so that no pairs of layers are found:"
            f" {reason(error)}. Remove control flow that depends on the input."
        ) from None
    modules = dict(model.named_modules())
    shared = _shared(graph, modules)
    pairs: list[Pair] = []
    refusals: list[Refusal] = []
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], LAYERS):
            for found in _from(node, modules, shared):
                (pairs if isinstance(found, Pair) else refusals).append(found)  # type: ignore[arg-type]
    return pairs, refusals


def _shared(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[str]:
    """Return the modules that are called twice, share a tensor with another, or whose weights are computed."""
    calls = Counter(id(modules[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    owners = Counter(id(p) for module in set(modules.values()) for p in module._parameters.values() if p is not None)
    return {
        name
        for name, module in modules.items()
        if calls[id(module)] > 1
        or is_parametrized(module)
        or any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None)
    }


def _from(node: Any, modules: dict[str, nn.Module], shared: set[str]) -> Iterator[Pair | Refusal]:
    """Follow the graph from a layer: first to a BatchNorm, then to the next layer."""
    name, start = node.target, node
    if name in shared:
        yield Refusal(name, "its weights are used twice, or are computed from others")
        return
    after = _only_user(node)
    if isinstance(norm := _module(after, modules), _BatchNorm):
        if norm.running_var is None or not norm.affine or after.target in shared:
            yield Refusal(name, f"{after.target} has no statistics or no factor of its own")
            return
        yield Pair(name, after.target, "norm")
        start = after
    node = start
    while (user := _only_user(node)) is not None:
        behind = _module(user, modules)
        if isinstance(behind, LAYERS):
            yield _joined(start.target, user.target, modules, shared)
            return
        if not _passes(user, behind):
            if user.op != "output":
                yield Refusal(start.target, _reason(user, behind))
            return
        node = user
    yield Refusal(start.target, "its output goes to several places (a residual connection)")


def _joined(first: str, second: str, modules: dict[str, nn.Module], shared: set[str]) -> Pair | Refusal:
    if second in shared:
        return Refusal(first, f"the weights of {second} are used twice, or are computed from others")
    if _inputs(modules[second]) % _outputs(modules[first]):
        return Refusal(first, f"the channels are mixed on the way to {second}")
    return Pair(first, second, "layers")


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _module(node: Any, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules[node.target] if node is not None and node.op == "call_module" else None


def _passes(node: Any, module: nn.Module | None) -> bool:
    """Return whether a node is positively homogeneous and keeps the channels in order."""
    if node.op == "call_module":
        return isinstance(module, PASSING)
    return node.target in (FUNCTIONS if node.op == "call_function" else METHODS if node.op == "call_method" else ())


def _reason(node: Any, module: nn.Module | None) -> str:
    name = type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))
    why = BENT.get(name, "it is not known to be")
    return f"{name} behind it is not positively homogeneous: {why}"


def rescaled(model: nn.Module, pairs: list[Pair], *, by: By, most: float = 4.0, seed: int = 0) -> nn.Module:
    """Return a copy of a network, each pair scaled by factors between 1 / most and most.

    Args:
        model: is not changed.
        pairs: of `find_pairs`.
        by: one factor for each pair, or for each of its channels.
        most: the largest factor; logarithms of factors are uniform.
        seed: of the draws.
    """
    copied = copy.deepcopy(model)
    modules = dict(copied.named_modules())
    with torch.no_grad():
        for pair in pairs:
            first, second = modules[pair.first], modules[pair.second]
            count = 1 if by == "layer" else _outputs(first)
            even = torch.rand(count, generator=generator("rescaling", seed, pair.first, pair.kind), dtype=torch.float64)
            factors = ((2 * even - 1) * math.log(most)).exp().expand(_outputs(first))
            _ACTS[pair.kind](first, second, factors)
    return copied


def _against_norm(layer: Any, norm: Any, factors: Tensor) -> None:
    _scale_outputs(layer, factors)
    scale = factors.to(norm.running_var)
    norm.running_mean.mul_(scale)
    # The variance grows by c^2, and eps does not: the factor of the norm compensates.
    before = norm.running_var + norm.eps
    norm.running_var.mul_(scale**2)
    norm.weight.mul_(((norm.running_var + norm.eps) / before).sqrt() / scale)


def _against_layer(first: Any, second: Any, factors: Tensor) -> None:
    _scale_outputs(first, factors)
    weight = second.weight
    inverse = (1 / factors).repeat_interleave(_inputs(second) // len(factors)).to(weight)
    groups = getattr(second, "groups", 1)
    rows = inverse.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    weight.mul_(rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)))


_ACTS: dict[str, Callable[[Any, Any, Tensor], None]] = {"norm": _against_norm, "layers": _against_layer}


def _scale_outputs(layer: Any, factors: Tensor) -> None:
    scale = factors.to(layer.weight)
    layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(scale)


def _outputs(layer: Any) -> int:
    return int(layer.weight.shape[0])


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
