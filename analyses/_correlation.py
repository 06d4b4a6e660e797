"""Spearman's correlation over (method, held-out domain, seed), with bootstrap intervals over blocks. Torch-free.

A block is a held-out domain with a seed: all methods share its split and its batches, so that blocks, not runs, are
drawn with replacement.
"""

import numpy as np
import pandas as pd
from scipy import stats

from flatlab.arguments import FloatArray
from flatlab.report.tables import LEVEL

DRAWS = 1000
KINDS = ("all runs", "within method", "between methods", "within block")


def correlations(x: pd.DataFrame, y: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Return Spearman's correlation of each kind, with percentile intervals of the bootstrap over blocks.

    "all runs": of all runs at once; "within method": of a method's blocks, mean over methods; "between methods": of
    the methods' means over blocks; "within block": of the methods at one held-out domain and seed, mean over blocks.

    Args:
        x: (M, B), a row for each method and a column for each block.
        y: (M, B), the same methods and blocks.
        seed: of the bootstrap.

    Returns:
        Rows with `kind`, `value`, `low`, `high`; NaN if a side does not vary.
    """
    first, second = x.to_numpy(float), y.to_numpy(float)
    blocks = first.shape[1]
    drawn = np.random.default_rng(seed).integers(blocks, size=(DRAWS, blocks))
    found = _kinds(first[None], second[None])
    spread = _kinds(first[:, drawn].swapaxes(0, 1), second[:, drawn].swapaxes(0, 1))  # each (DRAWS, M, B)
    return pd.DataFrame(
        [{"kind": kind, "value": float(found[kind][0]), **_interval(spread[kind], blocks)} for kind in KINDS]
    )


def _kinds(x: FloatArray, y: FloatArray) -> dict[str, FloatArray]:
    """Return the correlations (D,) of each kind, of arrays (D, M, B)."""
    count = len(x)
    return {
        "all runs": spearman(x.reshape(count, -1), y.reshape(count, -1)),
        "within method": _mean(spearman(x, y)),
        "between methods": spearman(x.mean(axis=2), y.mean(axis=2)),
        "within block": _mean(spearman(x.swapaxes(1, 2), y.swapaxes(1, 2))),
    }


def spearman(x: FloatArray, y: FloatArray) -> FloatArray:
    """Return Spearman's correlation of x and y (..., n) along the last axis; NaN if one side does not vary."""
    ranks = [stats.rankdata(each, axis=-1) for each in (x, y)]
    first, second = (each - each.mean(axis=-1, keepdims=True) for each in ranks)
    scale = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        return np.asarray((first * second).sum(axis=-1) / np.where(scale > 0, scale, np.nan))


def _mean(values: FloatArray) -> FloatArray:
    """Return the mean of finite values along the last axis; NaN if there are none."""
    known = np.isfinite(values)
    count = known.sum(axis=-1)
    return np.asarray(np.where(known, values, 0.0).sum(axis=-1) / np.where(count > 0, count, np.nan))


def _interval(spread: FloatArray, blocks: int) -> dict[str, float]:
    known = spread[np.isfinite(spread)]
    if blocks < 2 or not len(known):
        return {"low": float("nan"), "high": float("nan")}
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"low": float(low), "high": float(high)}
