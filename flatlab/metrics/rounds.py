"""Two-way sampling: each direction sees one block of the images, and directions go in rounds over a fixed partition.

Write m(u, x) for the rise of image x's loss along direction u. Its variance splits into directions (V_A), images (V_B)
and what is left (V_E). A visit to a block of n images has variance V_A + V_E / n around the block's own mean. Within
complete rounds each image is used equally often, so that V_B cancels; the spread of the visits to one block, not the
spread of all visits, is then what the interval must know.
"""

from dataclasses import dataclass, replace

import numpy as np

from flatlab.metrics.results import Estimate, FloatArray, mean_of

FEW = 16  # repeated blocks below which their spread is not trusted


def estimate(visits: FloatArray, blocks: int) -> Estimate:
    """Return the mean rise from visits (J,), the j-th to block j mod `blocks`.

    From the first complete round on, the value is the mean over blocks of the block means: no image weighs more than
    another. Before that the visits are a sample of images too, and their whole spread enters the standard error; so it
    does in the first round, where no block is seen twice, and is then too large rather than too small.
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
            return replace(mean_of(visits[:blocks]), value=value)
        freedom = len(visits) - blocks
        spread = float(np.square(visits - means[index]).sum()) / freedom
    return Estimate(value, float(np.sqrt(spread * (1 / seen).sum())) / blocks, freedom)


@dataclass(frozen=True)
class Components:
    """Variances of the rise of one image's loss: between directions, between images, and the rest."""

    directions: float  # V_A
    images: float  # V_B
    rest: float  # V_E

    def of_visit(self, images: int) -> float:
        """Return the variance of a visit to a block of n images, around the block's own mean."""
        return self.directions + self.rest / images


def components(table: FloatArray) -> Components:
    """Split the variance of rises (G, D, n): G blocks of n images, each seen along D directions of its own.

    Two-way analysis of variance within each block, pooled; negative components are zero.
    """
    if not np.isfinite(table).all():
        return Components(np.nan, np.nan, np.nan)
    groups, directions, images = table.shape
    by_direction = table.mean(axis=2, keepdims=True)
    by_image = table.mean(axis=1, keepdims=True)
    whole = table.mean(axis=(1, 2), keepdims=True)
    rest = ((table - by_direction - by_image + whole) ** 2).sum() / (groups * (directions - 1) * (images - 1))
    between = images * ((by_direction - whole) ** 2).sum() / (groups * (directions - 1))
    of_images = directions * ((by_image - whole) ** 2).sum() / (groups * (images - 1))
    return Components(max(0.0, (between - rest) / images), max(0.0, (of_images - rest) / directions), float(rest))
