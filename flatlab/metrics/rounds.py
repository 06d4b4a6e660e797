"""Two-way sampling: each direction sees one block of the images, and directions go in rounds over a fixed partition.

Write m(u, x) for the rise of image x's loss along direction u. Its variance splits into directions (V_A), images (V_B)
and what is left (V_E). A visit to a block of n images has variance V_A + V_E / n around the block's own mean. Within
complete rounds each image is used equally often, so that V_B cancels; the spread of the visits to one block, not the
spread of all visits, is then what the interval must know.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from flatlab.metrics.results import Estimate, FloatArray, mean_of

FEW = 16  # repeated blocks below which their spread is not trusted


def estimate(visits: FloatArray, blocks: int, between: float = 0.0) -> Estimate:
    """Return the mean rise from visits (J,), the j-th to block j mod `blocks`.

    From the first complete round on, the value is the mean over blocks of the block means: no image weighs more than
    another. Before that the visits are a sample of images too, drawn without replacement: their whole spread enters
    the standard error, less what the images that were seen cannot do any more (Cochran 1977, Eq. 2.12).

    Args:
        visits: (J,) rises.
        blocks: how many there are.
        between: share of the visits' variance that lies between images; zero where it is not known, and the error is
            then too large.
    """
    if blocks == 1:
        return mean_of(visits)
    index = np.arange(len(visits)) % blocks
    seen = np.bincount(index)  # visits to each block, none of which is empty
    repeated = int((seen > 1).sum())
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is shown so
        means = np.bincount(index, visits) / seen
        value = float(means.mean()) if len(visits) else float("nan")
        if len(seen) < blocks or repeated < min(FEW, blocks):
            found = mean_of(visits[:blocks])
            left = 1.0 - between * min(len(visits), blocks) / blocks
            return replace(found, value=value, stderr=found.stderr * float(np.sqrt(left)))
        freedom = len(visits) - blocks
        spread = float(np.square(visits - means[index]).sum()) / freedom
    return Estimate(value, float(np.sqrt(spread * (1 / seen).sum())) / blocks, freedom)


@dataclass(frozen=True)
class Components:
    """Variances of the rise of one image's loss: between directions, between images of a stratum, and the rest."""

    directions: float  # V_A
    images: float  # V_B
    rest: float  # V_E

    def of_visit(self, images: int) -> float:
        """Return the variance of a visit to a block of n images, around the block's own mean."""
        return self.directions + self.rest / images

    def between(self, images: int) -> float:
        """Return which share of the spread of visits to different blocks lies between the blocks."""
        whole = self.of_visit(images) + self.images / images
        return self.images / images / whole if whole > 0 else 0.0


def components(table: FloatArray, strata: npt.NDArray[np.int64] | None = None) -> Components:
    """Split the variance of rises (G, D, n): G blocks of n images, each seen along D directions of its own.

    Two-way analysis of variance within each block, pooled; negative components are zero.

    Args:
        table: the rises.
        strata: (G, n) of the images: blocks hold a fixed share of each, so that only images of one stratum vary.
    """
    if not np.isfinite(table).all():
        return Components(np.nan, np.nan, np.nan)
    groups, directions, images = table.shape
    by_direction = table.mean(axis=2, keepdims=True)
    by_image = table.mean(axis=1, keepdims=True)
    whole = table.mean(axis=(1, 2), keepdims=True)
    rest = ((table - by_direction - by_image + whole) ** 2).sum() / (groups * (directions - 1) * (images - 1))
    between = images * ((by_direction - whole) ** 2).sum() / (groups * (directions - 1))
    cells = [
        block[:, members == stratum]
        for block, members in zip(table, np.zeros((groups, images)) if strata is None else strata, strict=True)
        for stratum in np.unique(members)
    ]
    of_images = sum(map(_between_images, cells)) / (groups * images)
    return Components(max(0.0, (between - rest) / images), max(0.0, of_images), float(rest))


def _between_images(cell: FloatArray) -> float:
    """Return n times the variance between n images of a stratum, from rises (D, n); zero of one image."""
    directions, images = cell.shape
    if images == 1:
        return 0.0
    around = cell - cell.mean(axis=1, keepdims=True)
    own = around.mean(axis=0)
    noise = np.square(around - own).sum() / (directions - 1) / directions
    return float((np.square(own).sum() - noise) * images / (images - 1))
