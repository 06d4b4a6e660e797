"""GradCAM maps of images, the energy in a mask, and the agreement of maps."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.results.estimate import Stored, axes_of
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


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


def heat(evidence: npt.NDArray[np.floating], peak: float | None = None) -> FloatArray:
    """Return the colours (H, W, 3) of a map, in [0, 1].

    Args:
        evidence: (H, W), not negative.
        peak: the evidence that is shown as the strongest; None: the map's own largest.
    """
    from matplotlib import colormaps

    most = float(evidence.max()) if peak is None else peak
    return np.asarray(colormaps["jet"](evidence / most if most > 0 else evidence)[..., :3])


def pixels(image: npt.NDArray[np.uint8]) -> FloatArray:
    """Return an image (H, W, 3) in [0, 1] from (C, H, W) in 0 to 255, of one channel or three."""
    last = np.moveaxis(image.astype(float) / 255, 0, -1)
    return np.broadcast_to(last, (*last.shape[:2], 3))


def _row(images: Iterable[FloatArray], ax: "Axes | None") -> "Axes":
    """Draw images side by side."""
    axes = axes_of(ax)
    axes.imshow(np.concatenate(list(images), axis=1), interpolation="nearest")
    axes.set_axis_off()
    return axes


MOST = 8  # images of a picture


Method = Literal["gradcam", "gradcam++", "xgradcam", "hirescam", "layercam"]


@dataclass(frozen=True, eq=False)
class ClassMaps(Saved):
    """Where images hold evidence for a class.

    Attributes:
        maps: (N, H, W) at the images' size, not negative, in the units of the logit; zero without evidence for it.
        classes: (N,) the class that each map explains.
        layer: name of the module whose outputs were weighed.
        grid: its height and width; None where they were not kept.
        method: how its channels were weighed.
    """

    maps: FloatArray
    classes: tuple[int, ...]
    layer: str
    grid: tuple[int, int] | None
    method: Method = "gradcam"

    def scaled(self) -> FloatArray:
        """Return the maps, each divided by its own largest value, as papers show them; zero maps stay zero."""
        peaks = self.maps.max(axis=(1, 2), keepdims=True)
        return ratio(self.maps, peaks, 0.0)

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each image: the class, and the largest evidence for it."""
        import pandas as pd

        return pd.DataFrame({"label": self.classes, "peak": self.maps.max(axis=(1, 2))}).assign(layer=self.layer)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the first eight maps side by side, each on its own scale."""
        return _row(map(heat, self.maps[:MOST]), ax)


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredMaps(Stored):
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
    moved: FloatArray | None = None
    mask: npt.NDArray[np.uint8] | None = None
    layer: str
    classes: tuple[str, ...]
    radii: tuple[float, ...]
    held_out: str
    seed: int

    @property
    def class_maps(self) -> ClassMaps:
        """The maps alone, as `gradcam` returns them."""
        return ClassMaps(self.maps.astype(np.float64), tuple(self.labels.tolist()), self.layer, None)

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each image, and how far its map can be relied on.

        Columns: `row` in the domain, `label`, `predicted`, `probability` of the true class, areas below the curves of
        `deletion` and `insertion`, and `empty` (1: no evidence for the class). With a mask, the share of `energy` in it
        (NaN for an empty map), and its `area`. With moved weights, the mean agreement `moved` with the own map (NaN
        where none has one), and the share of maps that have `vanished` (NaN for an empty map).
        """
        import pandas as pd

        empty, each = ~(self.maps.max(axis=(1, 2)) > 0), np.arange(len(self.labels))
        frame = pd.DataFrame({"row": self.rows, "label": self.labels, "predicted": self.probabilities.argmax(axis=1)})
        frame = frame.assign(probability=self.probabilities[each, self.labels], empty=empty.astype(float))
        for name, curve in {"deletion": self.deletion, "insertion": self.insertion}.items():
            frame[name] = np.trapezoid(curve, dx=1 / (curve.shape[1] - 1))
        if self.mask is not None:
            frame = frame.assign(energy=energy(self.maps, self.mask), area=self.mask.mean(axis=(1, 2)))
        if self.moved is not None:
            counts = np.isfinite(self.moved).sum(axis=(0, 1)).astype(float)
            tries = self.moved.shape[0] * self.moved.shape[1]
            frame["moved"] = ratio(np.nansum(self.moved, axis=(0, 1)), counts, np.nan)
            frame["vanished"] = np.where(empty, np.nan, 1 - counts / tries)
        return frame

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the first eight images side by side, each below its map on its own scale."""
        pairs = zip(self.images[:MOST], self.maps[:MOST], strict=True)
        return _row((0.5 * pixels(image) + 0.5 * heat(evidence) for image, evidence in pairs), ax)
