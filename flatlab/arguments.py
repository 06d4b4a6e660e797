"""Numbers that a caller hands in, checked: one sentence says what was expected and what was given. Torch-free."""

import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from flatlab.errors import UserError


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Return a whole number of at least `least`.

    Args:
        name: what it is, for the message.
        value: an int, or what counts as one (of NumPy, a tensor of one integer); not a bool.
        least: the smallest that is taken.

    Raises:
        UserError: if it is something else.
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
        name: what it is, for the message.
        value: a number; not a bool.
        above: it must be larger than this.
        least: it must be at least this.

    Raises:
        UserError: if it is something else.
    """
    try:
        number = float("nan") if isinstance(value, bool | np.bool_ | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = float("nan")
    if not (np.isfinite(number) and (above is None or number > above) and (least is None or number >= least)):
        bound = f" > {above:g}" if above is not None else f" >= {least:g}" if least is not None else ""
        raise UserError(f"{name} must be a finite number{bound}, got {value!r}.")
    return number


def distances(name: str, values: npt.ArrayLike, *, above: float | None = None) -> npt.NDArray[np.float64]:
    """Return radii (R,), one or more, as float64.

    Args:
        name: what they are, for the message.
        values: a number, or a row of them.
        above: they must be larger than this; at least 0 by default.

    Raises:
        UserError: if they are something else, or there are none.
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
