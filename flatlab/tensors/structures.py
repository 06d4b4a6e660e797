"""Nests of tensors: tuples, lists, dictionaries and other types that pytree knows; dataclasses, any other mapping."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def leaves(nest: Any) -> Iterator[Any]:
    """Yield the leaves of a nest, in a fixed order."""
    for leaf in tree_leaves(nest):
        if isinstance(leaf, Tensor) or (inside := _inside(leaf)) is None:
            yield leaf
        else:
            yield from leaves(inside)


def mapped(change: Callable[..., Any], nest: Any, *others: Any) -> Any:
    """Return a nest of `change(leaf, ...)` for each leaf; further arguments are the leaves of other nests at its place.

    Mappings that pytree does not know (transformers' BatchEncoding) become dictionaries; dataclasses stay.
    """

    def at(leaf: Any, *rest: Any) -> Any:
        inside = None if isinstance(leaf, Tensor) else _inside(leaf)
        if inside is None:
            return change(leaf, *rest)
        found = mapped(change, inside, *(_inside(each) for each in rest))
        return found if isinstance(leaf, Mapping) else _replaced(leaf, found)

    return tree_map(at, nest, *others)


def entry(nest: Any, name: str) -> Any:
    """Return the entry of a mapping, or the field of a dataclass or named tuple, with this name; None otherwise."""
    return nest.get(name) if isinstance(nest, Mapping) else getattr(nest, name, None)


def _inside(leaf: Any) -> dict[str, Any] | None:
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in fields(leaf)}
    return None


def _replaced(record: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass with other fields, without its constructor, which may compute or refuse them."""
    result = copy(record)
    for name, value in values.items():
        object.__setattr__(result, name, value)
    return result
