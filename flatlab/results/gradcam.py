"""GradCAM maps of images, the energy in a mask, and the agreement of maps."""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray


def energy(maps: npt.NDArray[np.floating], masks: npt.NDArray[Any]) -> FloatArray:
    """Return the share of each map that lies inside a mask (N,), summed in float64; NaN for a map of zeros.

    Args:
        maps: (N, H, W), not negative.
        masks: (N, H, W), 0 or 1.
    """
    wide = maps.astype(np.float64)
    return ratio((wide * masks).sum(axis=(1, 2)), wide.sum(axis=(1, 2)), np.nan)


def agreement(maps: npt.NDArray[np.floating], others: npt.NDArray[np.floating]) -> FloatArray:
    """Return Pearson's correlation of each map with its partner (N,), in float64; NaN where one of them is flat.

    Args:
        maps: (N, H, W).
        others: (N, H, W) of the same images.
    """
    flat = [each.astype(np.float64).reshape(len(each), -1) for each in (maps, others)]
    a, b = (each - each.mean(axis=1, keepdims=True) for each in flat)
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


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredMaps:
    """A network's maps of N images of its held-out domain, and how far they can be relied on.

    Attributes:
        maps: (N, H, W) of the true classes, as in `ClassMaps`, in float32.
        deletion: (N, Q) the true class's probability, the more of the image deleted, from 0 to all of it.
        insertion: (N, Q) the same, the more of it inserted.
        images: (N, C, H, W) from 0 to 255.
        rows: (N,) their row numbers in the domain.
        labels: (N,) their classes.
        probabilities: (N, num_classes) that the network gives them.
        moved: (K, R, N) the agreement of the maps with those at weights moved along K directions by R radii; None
            where none was asked for.
        mask: (N, H, W) 1 where there is ink, 0 elsewhere; None for data without ink.
        layer: name of the module whose outputs were weighed.
        classes: names of the classes.
        radii: the R radii.
        held_out: name of the domain.
        seed: of the choice of the images and the directions.
    """

    maps: npt.NDArray[np.float32]
    deletion: FloatArray
    insertion: FloatArray
    images: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    probabilities: FloatArray
    moved: FloatArray | None
    mask: npt.NDArray[np.uint8] | None
    layer: str
    classes: tuple[str, ...]
    radii: tuple[float, ...]
    held_out: str
    seed: int

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        arrays = {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
        facts = {name: named[name] for name in ("layer", "held_out", "seed")}
        facts |= {"classes": list(self.classes), "radii": list(self.radii)}
        return arrays, facts

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns; other facts are ignored."""
        lists = {"classes": tuple(facts["classes"]), "radii": tuple(facts["radii"])}
        plain = {name: facts[name] for name in ("layer", "held_out", "seed")}
        return cls(**{"moved": None, "mask": None, **arrays, **lists, **plain})
