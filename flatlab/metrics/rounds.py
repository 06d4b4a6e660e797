"""Two-way sampling: each direction sees one block of the images, and directions go in rounds over a fixed partition.

Write m(u, x) for the rise of image x's loss along direction u. Its variance splits into directions (V_A), images (V_B)
and what is left (V_E). A visit to a block of n images has variance V_A + V_E / n around the block's own mean. Within
complete rounds each image is used equally often, so that V_B cancels; the spread of the visits to one block, not the
spread of all visits, is then what the interval must know.
"""

from dataclasses import dataclass

import numpy as np

from flatlab.metrics.results import Estimate, FloatArray, mean_of

FEW = 16  # repeated blocks below which their spread is not trusted


def estimate(visits: FloatArray, blocks: int) -> Estimate:
    """Return the mean rise from visits (J,), the j-th to block j mod `blocks`.

    From the first complete round on, the value is the mean over blocks of the block means: no image weighs more than
    another. Before that the visits are a sample of images too, and their whole spread enters the standard error; so it
    does in the first round, where no block is seen twice, and is then too large rather than too small.
    """
    count = len(visits)
    full, rest = divmod(count, blocks)
    repeated = blocks if full > 1 else rest if full == 1 else 0
    if full == 0 or repeated < min(FEW, blocks):
        return _unrepeated(visits, blocks)
    members = [visits[b::blocks] for b in range(blocks)]
    value = float(np.mean([member.mean() for member in members]))
    freedom = count - blocks
    with np.errstate(invalid="ignore"):
        spread = sum(float(member.var() * len(member)) for member in members) / freedom
    return Estimate(value, float(np.sqrt(spread * sum(1 / len(m) for m in members)) / blocks), freedom)


def _unrepeated(visits: FloatArray, blocks: int) -> Estimate:
    first = mean_of(visits[:blocks])
    members = [visits[b::blocks].mean() for b in range(min(blocks, len(visits)))]
    return Estimate(float(np.mean(members)), first.stderr, first.freedom)


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
    groups, directions, images = table.shape
    by_direction = table.mean(axis=2, keepdims=True)
    by_image = table.mean(axis=1, keepdims=True)
    whole = table.mean(axis=(1, 2), keepdims=True)
    rest = ((table - by_direction - by_image + whole) ** 2).sum() / (groups * (directions - 1) * (images - 1))
    between = images * ((by_direction - whole) ** 2).sum() / (groups * (directions - 1))
    of_images = directions * ((by_image - whole) ** 2).sum() / (groups * (images - 1))
    return Components(max(0.0, (between - rest) / images), max(0.0, (of_images - rest) / directions), float(rest))
