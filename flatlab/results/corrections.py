"""Corrections of p-values for families of tests. Torch-free."""

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.errors import UserError


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Return p-values adjusted by Holm's step-down method: one below alpha is significant in the family at alpha.

    The chance of one false rejection or more is then at most alpha, however the tests depend on each other
    (Holm 1979, Scand. J. Statist. 6, 65-70).

    Args:
        p_values: (m,) of the whole family. NaN, a test that could not be made, stays NaN and counts in m.

    Raises:
        UserError: where a p-value lies outside [0, 1], or they are not one row of numbers.
    """
    given = np.asarray(p_values, dtype=np.float64)
    known = np.where(np.isnan(given), 1.0, given)
    if given.ndim != 1 or (known < 0).any() or (known > 1).any():
        raise UserError(f"p_values must be one row of numbers from 0 to 1, got {p_values!r}.")
    order = np.argsort(known, kind="stable")
    factors = np.arange(len(given), 0, -1)
    adjusted = np.empty_like(known)
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * factors), 1.0)
    return np.where(np.isnan(given), np.nan, adjusted)
