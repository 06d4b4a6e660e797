"""Loss landscapes and flatness of neural networks: quantized ones, and under domain shift.

`flatlab.NAME` is `flatlab.api.NAME`, imported on first access (PEP 562), so that `import flatlab` and
`flatlab --help` do not load torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Fetch a public name from `flatlab.api`, or a module of the package, such as `flatlab.watch`."""
    if name.startswith("_"):
        raise AttributeError(name)
    if find_spec(f"flatlab.{name}"):
        return import_module(f"flatlab.{name}")
    api = import_module("flatlab.api")
    if name not in api.__all__:
        raise AttributeError(f"flatlab has no {name!r}; public names: {', '.join(sorted(api.__all__))}")
    return getattr(api, name)


def __dir__() -> list[str]:
    """List the public names."""
    return ["__version__", *import_module("flatlab.api").__all__]
