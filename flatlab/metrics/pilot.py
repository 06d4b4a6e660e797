"""The pilot: a few directions on a few images say how large blocks should be, whether to pair, and how many visits.

Its draws are not used again: what chooses the plan must not bias the number.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flatlab.blocks import Block, Gathered
from flatlab.landscape import Landscape
from flatlab.metrics.rays import Normalisation, draw_ray, reach
from flatlab.metrics.results import FloatArray
from flatlab.metrics.rounds import Components, components
from flatlab.metrics.sampling import MOST, SAFETY, Goal, Plan, Sampler, settled
from flatlab.points import Move

GROUPS, DIRECTIONS, IMAGES = 16, 4, 16  # 64 independent directions, each on a block of 16 images
FEWEST = 4 * IMAGES  # images of a landscape below which a pilot costs more than it saves: each ray meets them all
SIZES = (16, 32, 64, 128, 256)  # of blocks that are tried; below 16 the cost of setting a point shows
TIMED = 3  # turns of the clock: where others use the machine too, the best of each size
Value = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Pilot:
    """What the pilot found."""

    single: list[Components]  # for each radius
    paired: list[Components]
    alone: bool  # of one landscape: the images' share of a difference is not that of either
    mean: FloatArray  # (R,) rises
    seconds: dict[int, float]  # of evaluating a block, by its size
    drawing: float  # seconds of a ray


def fly(
    landscapes: Sequence[Landscape], radii: FloatArray, *, seed: int, normalisation: Normalisation, value: Value
) -> Pilot:
    """Fly the pilot: rises of single images at each radius along rays of its own, there and back.

    Args:
        landscapes: one, or two to be compared.
        radii: (R,) above zero.
        seed: of the measurement.
        normalisation: of the rays.
        value: from rises (L, ...) of the landscapes to those of the number that is sought.
    """
    tables, drawing = [], 0.0
    for landscape in landscapes:
        table, each = _table(landscape, radii, seed, normalisation)
        tables.append(table)
        drawing += each
    signed = value(np.stack(tables))  # (2, R, G, D, n)
    both = signed.mean(axis=0)
    strata = np.array([block.strata[: both.shape[-1]] for block in _groups(landscapes[0], seed)[0]])
    clocked = [_seconds(each, seed) for each in landscapes]
    return Pilot(
        single=[components(table, strata) for table in signed[0]],
        paired=[components(table, strata) for table in both],
        alone=len(landscapes) == 1,
        mean=np.max([np.abs(table.mean(axis=(0, 2, 3, 4))) for table in tables], axis=0),
        seconds={size: sum(each[size] for each in clocked) for size in clocked[0]},
        drawing=drawing,
    )


def price(landscapes: Sequence[Landscape], radii: int, *, seed: int) -> int:
    """Return the images that a pilot forwards."""
    blocks, directions = _groups(landscapes[0], seed)
    rises = sum(block.size for block in blocks) * (1 + 2 * radii * directions)
    return len(landscapes) * (rises + TIMED * sum(_sizes(landscapes[0])))


def _groups(landscape: Landscape, seed: int) -> tuple[list[Block], int]:
    """Return blocks, and how many directions each of them sees: 64 in all at least."""
    blocks = landscape.blocks(IMAGES, seed=seed)[:GROUPS]
    return blocks, -(-GROUPS * DIRECTIONS // len(blocks))


def _table(
    landscape: Landscape, radii: FloatArray, seed: int, normalisation: Normalisation
) -> tuple[FloatArray, float]:
    """Return the rises (2, R, G, D, n) of single images for both signs, and the seconds of drawing a ray."""
    blocks, directions = _groups(landscape, seed)
    images = min(block.size for block in blocks)
    table = np.zeros((2, len(radii), len(blocks), directions, images))
    ends, drawing = np.stack([radii, -radii]), 0.0
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        still = landscape.point
        for g, block in enumerate(blocks):
            each = landscape.gather(block.by_sample())
            base = at(still, 0.0, block=each)
            for d in range(directions):
                start = time.perf_counter()
                ray = draw_ray(landscape, seed, -1 - g * directions - d, normalisation=normalisation)
                drawing += time.perf_counter() - start
                table[:, :, g, d] = (at(ray, ends, block=each) - base)[..., :images]
    return table, drawing / (len(blocks) * directions)


def _sizes(landscape: Landscape) -> list[int]:
    fitting = [size for size in SIZES if size <= landscape.num_samples // 2]
    return fitting or [landscape.num_samples]


def _seconds(landscape: Landscape, seed: int) -> dict[int, float]:
    """Return the seconds of one evaluation of a block, by its size; sizes take turns, so that a busy spell hits all."""
    gathered = {size: landscape.gather(landscape.blocks(size, seed=seed)[0]) for size in _sizes(landscape)}
    with landscape.moving() as at:
        turns = [{size: _clocked(at, each, landscape.point) for size, each in gathered.items()} for _ in range(TIMED)]
    return {size: min(turn[size] for turn in turns) for size in gathered}


def _clocked(at: Move, gathered: Gathered, still: Tensor) -> float:
    start = time.perf_counter()
    at(still, 0.0, block=gathered)
    return time.perf_counter() - start


def plan(pilot: Pilot, radii: FloatArray, goal: Goal, samples: int) -> list[Plan]:
    """Return for each radius the block size, and whether to pair, that reach the goal in the least time."""
    return [_best(pilot, index, float(radius), goal, samples) for index, radius in enumerate(radii)]


def _best(pilot: Pilot, index: int, radius: float, goal: Goal, samples: int) -> Plan:
    tolerance = goal.tolerance(float(pilot.mean[index]))
    options = []
    for paired, found in ((False, pilot.single[index]), (True, pilot.paired[index])):
        for size, seconds in pilot.seconds.items():
            price = pilot.drawing / len(pilot.mean) + seconds * (2 if paired else 1)
            between = found.between(size) if pilot.alone else 0.0
            visits = foresee(found, size, max(1, round(samples / size)), tolerance, between)
            foreseen = visits if visits < MOST else 0  # not finite, or out of reach: what is seen decides
            cut = 0 if size >= samples else size
            options.append((visits * price, Plan(radius, cut, paired, foreseen, between)))
    return min(options, key=lambda option: option[0])[1]


def foresee(found: Components, size: int, blocks: int, tolerance: float, between: float) -> int:
    """Return the visits that bring the standard error to the tolerance: short of a round, where that does."""
    wanted, long = max(tolerance**2 / SAFETY, sys.float_info.min), found.of_visit(size)
    whole = long + found.images / size
    short, long = whole / (wanted + between * whole / blocks), long / wanted
    if short < blocks:
        return settled(int(short), blocks)
    return settled(max(int(long), blocks), blocks) if long < MOST else MOST


LOW, HIGH, PLACES = 0.01, 2.0, 6  # nats that automatic radii span, and how many there are
RAYS, STEPS = 8, 12  # pairs of rays that find them, each on a block, and steps of a bisection


def span(sampler: Sampler) -> FloatArray:
    """Return radii between those where the loss rises by 0.01 and by 2 nats, evenly spaced in their logarithm.

    Found by bisection on eight pairs of rays; where the loss never rises so far, where it stops being finite.
    """
    landscape = sampler.landscapes[0]
    gathered = [landscape.gather(block) for block in _spanned(sampler)]
    drawn = [draw_ray(landscape, sampler.seed, -1 - k, normalisation=sampler.normalisation) for k in range(RAYS)]
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        bases = [at(ray, 0.0, block=each).mean() for ray, each in zip(drawn, gathered, strict=True)]

        def rise(radius: float) -> float:
            ends = [at(ray, [radius, -radius], block=each).mean() for ray, each in zip(drawn, gathered, strict=True)]
            return float(np.mean(ends) - np.mean(bases))

        # Weights that are all zero have no length; one step of 1 in each of them stands for it.
        length = landscape.norm
        unit = length / reach(landscape, sampler.normalisation) if length else landscape.num_params**0.5
        return np.asarray(np.geomspace(_bisect(rise, LOW, unit), _bisect(rise, HIGH, unit), PLACES))


def span_price(sampler: Sampler) -> int:
    """Return the images that finding the radii forwards."""
    return sum(block.size for block in _spanned(sampler)) * (1 + 2 * 2 * STEPS)


def _spanned(sampler: Sampler) -> list[Block]:
    blocks = sampler.landscapes[0].blocks(2 * IMAGES, seed=sampler.seed)
    return [blocks[k % len(blocks)] for k in range(RAYS)]


def _bisect(rise: Callable[[float], float], target: float, unit: float) -> float:
    low, high = -10.0, 6.0  # powers of 2 of the unit
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(unit * 2**middle) < target else (low, middle)
    return float(unit * 2**low)
