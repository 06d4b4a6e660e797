"""Numbers of maps over images, without torch: the share inside a mask, and how alike two maps are."""

import numpy as np

from flatlab.metrics.results import FloatArray


def energy(maps: FloatArray, masks: FloatArray) -> FloatArray:
    """Return the share of each map that lies inside a mask (N,); NaN for a map of zeros.

    Args:
        maps: (N, H, W), not negative.
        masks: (N, H, W), 0 or 1.
    """
    return ratio((maps * masks).sum(axis=(1, 2)), maps.sum(axis=(1, 2)), np.nan)


def agreement(maps: FloatArray, others: FloatArray) -> FloatArray:
    """Return Pearson's correlation of each map with its partner (N,); NaN where one of them is flat.

    Args:
        maps: (N, H, W).
        others: (N, H, W) of the same images.
    """
    a, b = (
        each.reshape(len(each), -1) - each.reshape(len(each), -1).mean(axis=1, keepdims=True) for each in (maps, others)
    )
    lengths = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    return ratio((a * b).sum(axis=1), lengths, np.nan)


def ratio(above: FloatArray, below: FloatArray, otherwise: float) -> FloatArray:
    """Return a quotient, and a value of its own where the denominator is zero."""
    found: FloatArray = np.divide(above, below, out=np.full_like(above, otherwise), where=below > 0)
    return found
