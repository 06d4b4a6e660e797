"""Refinement: a plane is evaluated where linear interpolation would be wrong, and interpolated elsewhere."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray

COARSEST = 9  # minimum number of places along an axis with which refinement begins
FLOOR = 0.02  # share of the range that is added to the height to which the tolerance is relative
Mask = npt.NDArray[np.bool_]
Evaluate = Callable[[FloatArray], FloatArray]
"""From places (N, 2) to values (N, S, M); refinement is by the first metric."""


def refined(evaluate: Evaluate, x: FloatArray, y: FloatArray, tolerance: float | None) -> tuple[FloatArray, Mask]:
    """Return values (G1, G2, S, M) on a grid, and where they were measured: everywhere without a tolerance."""
    stride = 1 if tolerance is None else _coarsest(len(x) - 1, len(y) - 1)
    values = _evaluate(evaluate, x[::stride], y[::stride], np.ones((len(x[::stride]), len(y[::stride])), dtype=bool))
    measured, open_cells = np.ones(values.shape[:2], dtype=bool), np.ones(np.subtract(values.shape[:2], 1), dtype=bool)
    while stride > 1:
        stride //= 2
        assert tolerance is not None
        open_cells &= _bent(values[..., 0], tolerance)
        values, measured = _halved(values), _spread(measured)
        wanted = _corners(np.repeat(np.repeat(open_cells, 2, 0), 2, 1)) & ~measured
        values[wanted] = _evaluate(evaluate, x[::stride], y[::stride], wanted)[wanted]
        measured |= wanted
        open_cells = np.repeat(np.repeat(open_cells, 2, 0), 2, 1)
    return values, measured


def _evaluate(evaluate: Evaluate, x: FloatArray, y: FloatArray, wanted: Mask) -> FloatArray:
    """Return values (G1, G2, S, M), NaN where none is wanted."""
    rows, columns = np.nonzero(wanted)
    found = evaluate(np.stack([x[rows], y[columns]], axis=1))
    values = np.full((*wanted.shape, *found.shape[1:]), np.nan)
    values[rows, columns] = found
    return values


def _coarsest(*cells: int) -> int:
    """Return the largest power of 2 that divides the cells of both axes and leaves at least `COARSEST` places."""
    stride = 1
    while all(each % (2 * stride) == 0 and each // (2 * stride) >= COARSEST - 1 for each in cells):
        stride *= 2
    return stride


def _bent(values: FloatArray, tolerance: float) -> Mask:
    """Return for each cell whether linear interpolation of values (G1, G2, S) is likely to be wrong in or next to it.

    The error of linear interpolation is an eighth of the second difference. Cells with finite and other values count.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(np.subtract(values.shape[:2], 1), dtype=bool)
    low, high = values[finite].min(), values[finite].max()
    allowed = tolerance * (np.where(finite, values, low) - low + FLOOR * (high - low))
    off = np.zeros(values.shape)
    for axis in (0, 1):
        moved = np.moveaxis(values, axis, 0)
        with np.errstate(invalid="ignore"):
            second = np.abs(moved[2:] - 2 * moved[1:-1] + moved[:-2]) / 8
        padded = np.pad(np.nan_to_num(second, nan=0.0, posinf=0.0), [(1, 1), *[(0, 0)] * 2], mode="edge")
        off = np.maximum(off, np.moveaxis(padded, 0, axis))
    doubtful = (off > allowed).any(axis=2)
    edge = _cells(np.asarray(~finite.all(axis=2))) & _cells(np.asarray(finite.any(axis=2)))
    return _cells(doubtful) | edge


def _cells(points: Mask) -> Mask:
    """Return for each cell whether one of its corners is marked."""
    return points[1:, 1:] | points[:-1, 1:] | points[1:, :-1] | points[:-1, :-1]


def _corners(cells: Mask) -> Mask:
    """Return for each place whether it is a corner of a marked cell."""
    return _cells(np.pad(cells, 1))


def _halved(values: FloatArray) -> FloatArray:
    """Return values on a grid of half the spacing, those at new places by linear interpolation."""
    for axis in (0, 1):
        rows = np.moveaxis(values, axis, 0)
        new = np.empty((2 * len(rows) - 1, *rows.shape[1:]))
        with np.errstate(invalid="ignore"):
            new[::2], new[1::2] = rows, [(a + b) / 2 for a, b in pairwise(rows)]
        values = np.moveaxis(new, 0, axis)
    return values


def _spread(measured: Mask) -> Mask:
    spread = np.zeros([2 * size - 1 for size in measured.shape], dtype=bool)
    spread[::2, ::2] = measured
    return spread
