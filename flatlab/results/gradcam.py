"""GradCAM maps of images, the energy in a mask, and the agreement of maps."""

from dataclasses import dataclass

import numpy as np

from flatlab.results.estimate import FloatArray


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


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """Where images hold evidence for a class.

    Attributes:
        maps: (N, H, W) at the images' size, not negative, in the units of the logit; zero without evidence for it.
        classes: (N,) the class that each map explains.
        layer: name of the module whose outputs were weighed.
        grid: its height and width.
    """

    maps: FloatArray
    classes: tuple[int, ...]
    layer: str
    grid: tuple[int, int]

    def scaled(self) -> FloatArray:
        """Return the maps, each divided by its own largest value, as papers show them; zero maps stay zero."""
        peaks = self.maps.max(axis=(1, 2), keepdims=True)
        return ratio(self.maps, peaks, 0.0)
