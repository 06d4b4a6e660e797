"""How a model is called with a batch's inputs, and which of its outputs have a sample axis."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from flatlab.tensors.structures import leaves, mapped


def innermost(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the module inside the wrappers of torch.compile and of data parallelism."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Return the outputs of a model that have a sample axis.

    A dictionary whose keys are arguments of ``forward`` is passed by keywords, a tuple to a ``forward`` that needs
    several arguments one by one; all else is one argument.
    """
    if isinstance(inputs, Tensor):
        return of_samples(model(inputs))
    if isinstance(inputs, Mapping) and not unknown(model, inputs):
        return of_samples(model(**inputs))
    if isinstance(inputs, tuple) and len(_required(model)) > 1:
        return of_samples(model(*inputs))
    return of_samples(model(inputs))


def unknown(model: Callable[..., Any], inputs: Mapping[Any, Any]) -> list[str]:
    """Return the names that prevent passing a mapping by keywords: unknown keys, and missing required arguments."""
    known = _arguments(model)
    anything = any(each.kind is Parameter.VAR_KEYWORD for each in known.values())
    named = {name for name, each in known.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    foreign = [str(key) for key in inputs if not isinstance(key, str) or not (anything or key in named)]
    return foreign + [name for name in _required(model) if name not in inputs]


def of_samples(outputs: Any) -> Any:
    """Return outputs without those that have no sample axis: the mean loss that a model computes, caches of keys."""
    if isinstance(outputs, Tensor) or not any(_has_samples(leaf) for leaf in leaves(outputs)):
        return outputs
    return mapped(lambda leaf: leaf if _has_samples(leaf) else None, outputs)


def _has_samples(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _arguments(model: Callable[..., Any]) -> Mapping[str, Parameter]:
    written = innermost(model)
    return signature(written.forward if isinstance(written, nn.Module) else written).parameters


def _required(model: Callable[..., Any]) -> list[str]:
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [n for n, each in _arguments(model).items() if each.kind in kinds and each.default is Parameter.empty]
