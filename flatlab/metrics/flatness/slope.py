"""The slope at w, by forward passes only: if it dominates, w is not a minimum on these data."""

import numpy as np

from flatlab.arguments import FloatArray, Normalisation
from flatlab.landscape.blocks import Partition
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.seeds import derive

DIRECTIONS = 32  # each direction is evaluated on two blocks of images
FEWEST, MOST = 16, 64  # images of a block: a 32nd of them within these, four passes in all


def slopes(landscape: Landscape, radius: float, *, seed: int, normalisation: Normalisation = "none") -> FloatArray:
    """Return products (K, S, S) of the strata's slopes along directions, per radius squared; their mean is g_s' C g_t.

    C is the covariance of a direction, 1/P without normalisation. The odd part of the loss along a direction is its
    slope on those images. The slopes on two disjoint blocks are multiplied, so that the variance over images adds no
    bias.

    Args:
        landscape: of at least two samples.
        radius: so small that the odd part is the linear term.
        seed: of the measurement; the directions are separate draws.
        normalisation: of the directions.
    """
    blocks = _blocks(landscape, seed)
    products = np.zeros((DIRECTIONS, len(landscape.strata), len(landscape.strata)))
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        for k in range(DIRECTIONS):
            direction = draw_direction(landscape, derive("slope", seed), k, normalisation=normalisation)
            pair = (blocks[(2 * k + each) % len(blocks)] for each in (0, 1))
            ends = [at(direction, [radius, -radius], block=landscape.gather(block)) for block in pair]
            one, other = ((there - back) / (2 * radius) for there, back in ends)
            across = (np.outer(one, other) + np.outer(other, one)) / 2
            within = (np.outer(one, one) + np.outer(other, other)) / 2
            # Blocks are drawn without replacement: of B, pairs alone would be too low by the variance over images / B.
            products[k] = ((len(blocks) - 1) * across + within) / len(blocks)
    return products


def price(landscape: Landscape, *, seed: int) -> int:
    """Return the number of images that the slopes forward."""
    sizes = _blocks(landscape, seed).sizes
    return 2 * int(sizes[np.arange(2 * DIRECTIONS) % len(sizes)].sum())


def _blocks(landscape: Landscape, seed: int) -> Partition:
    size = min(max(landscape.num_samples // DIRECTIONS, FEWEST), MOST)
    return landscape.blocks(max(1, min(size, landscape.num_samples // 2)), seed=seed)
