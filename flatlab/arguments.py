"""Types of arguments, and their validation: the error states what was expected and what was given. Torch-free."""

import operator
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flatlab.errors import UserError

FloatArray = npt.NDArray[np.float64]
Normalisation = Literal["none", "filter", "layer", "parameter"]
"""Unit of a radius: none (L2 distance), or a share of the norm of each filter, layer or parameter."""
Report = Callable[[int, int], None]
"""Called as ``report(done, total)`` while something long is computed."""
JobReport = Callable[[int, int, dict[str, Any]], None]
"""Called as ``report(done, total, numbers)`` while a run is trained or measured; `numbers` are shown beside them."""


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Return an integer of at least `least`.

    Args:
        name: name of the argument, for the message.
        value: an int, or an equivalent (a NumPy integer, a tensor of one integer); not a bool.
        least: smallest accepted value.

    Raises:
        UserError: if the value is anything else.
    """
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        number = None
    if number is None or number < least:
        raise UserError(f"{name} must be an integer >= {least}, got {value!r}.")
    return number


def finite(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> float:
    """Return a finite number.

    Args:
        name: name of the argument, for the message.
        value: a number; not a bool.
        above: exclusive lower bound.
        least: inclusive lower bound.

    Raises:
        UserError: if the value is anything else.
    """
    try:
        number = float("nan") if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = float("nan")
    if not (np.isfinite(number) and (above is None or number > above) and (least is None or number >= least)):
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least is not None else ""
        raise UserError(f"{name} must be a finite number{bound}, got {value!r}.")
    return number


def distances(name: str, values: npt.ArrayLike, *, above: float | None = None) -> FloatArray:
    """Return radii (R,), one or more, as float64.

    Args:
        name: name of the argument, for the message.
        values: a number, or a sequence of numbers.
        above: exclusive lower bound; by default values must be at least 0.

    Raises:
        UserError: if they are anything else, or empty.
    """
    try:
        row = np.atleast_1d(np.asarray(values))
        row = row.astype(np.float64) if row.dtype.kind in "iuf" else np.full(1, np.nan)
    except (TypeError, ValueError, RuntimeError):
        row = np.full(1, np.nan)
    low = (row < 0) if above is None else (row <= above)
    if row.ndim != 1 or not row.size or not np.isfinite(row).all() or low.any():
        bound = ">= 0" if above is None else f"> {above:g}"
        raise UserError(f"{name} must be one or more finite numbers {bound}, got {values!r}.")
    return row
