"""Arguments of the library's functions that must be landscapes: anything else is refused in one sentence."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

from torch import nn

from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape

F = TypeVar("F", bound=Callable[..., Any])


def of_landscapes(call: F) -> F:
    """Let a function refuse what is no landscape where its annotations name one."""
    signature = inspect.signature(call)
    kinds = {name: get_args(each.annotation) or (each.annotation,) for name, each in signature.parameters.items()}
    kinds = {name: each for name, each in kinds.items() if Landscape in each}

    @functools.wraps(call)
    def run(*given: Any, **named: Any) -> Any:
        for name, value in _bound(signature, given, named).items():
            if name in kinds and not isinstance(value, kinds[name]):
                raise UserError(_sentence(call.__name__, name, value, kinds[name]))
        return call(*given, **named)

    return cast("F", run)


def _bound(signature: inspect.Signature, given: Any, named: Any) -> dict[str, Any]:
    known = {name: value for name, value in named.items() if name in signature.parameters}
    try:
        return signature.bind_partial(*given, **known).arguments
    except TypeError:  # the call itself states what is wrong
        return {}


def _sentence(function: str, name: str, value: Any, kinds: tuple[Any, ...]) -> str:
    wanted = " or a ".join(kind.__name__ for kind in kinds)
    build = ": build Landscape(model, data, loss) first" if isinstance(value, nn.Module) else ""
    return f"{function}: {name} must be a {wanted}, got {type(value).__name__}{build}."
