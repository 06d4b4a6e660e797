"""The pilot: a few directions on a few images say how large blocks should be, whether to pair, and how many visits.

Its draws are not used again: what chooses the plan must not bias the number.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flatlab.blocks import Block, Gathered
from flatlab.landscape import Landscape, Move
from flatlab.metrics.rays import Normalisation, draw_ray, reach
from flatlab.metrics.results import FloatArray
from flatlab.metrics.rounds import Components, components
from flatlab.metrics.sampling import SAFETY, Goal, Plan, Sampler

GROUPS, DIRECTIONS, IMAGES = 16, 4, 16  # 64 independent directions, each on a block of 16 images
SIZES = (16, 32, 64, 128, 256)  # of blocks that are tried; below 16 the cost of setting a point shows
Value = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Pilot:
    """What the pilot found."""

    single: list[Components]  # for each radius
    paired: list[Components]
    mean: FloatArray  # (R,) rises
    seconds: dict[int, float]  # of evaluating a block, by its size
    drawing: float  # seconds of a ray
    images: int  # forwarded


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
    blocks = landscapes[0].blocks(IMAGES, seed=seed)[:GROUPS]
    tables, drawing = [], 0.0
    for landscape in landscapes:
        table, each = _table(landscape, blocks, radii, seed, normalisation)
        tables.append(table)
        drawing += each
    signed = value(np.stack(tables))  # (2, R, G, D, n)
    both = signed.mean(axis=0)
    seconds = {size: sum(_time(each, size, seed) for each in landscapes) for size in _sizes(landscapes[0])}
    return Pilot(
        single=[components(table) for table in signed[0]],
        paired=[components(table) for table in both],
        mean=np.max([np.abs(table.mean(axis=(0, 2, 3, 4))) for table in tables], axis=0),
        seconds=seconds,
        drawing=drawing,
        images=sum(table.size for table in tables) + len(tables) * sum(2 * size for size in seconds),
    )


def _table(
    landscape: Landscape, blocks: Sequence[Block], radii: FloatArray, seed: int, normalisation: Normalisation
) -> tuple[FloatArray, float]:
    """Return the rises (2, R, G, D, n) of single images for both signs, and the seconds of drawing a ray."""
    images = min(block.size for block in blocks)
    table = np.zeros((2, len(radii), len(blocks), DIRECTIONS, images))
    drawing = 0.0
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        for g, block in enumerate(blocks):
            each = landscape.gather(block.by_sample())
            for d in range(DIRECTIONS):
                start = time.perf_counter()
                ray = draw_ray(landscape, seed, -1 - g * DIRECTIONS - d, normalisation=normalisation)
                drawing += time.perf_counter() - start
                base = at(ray, 0.0, block=each)
                for r, radius in enumerate(radii):
                    for sign in (0, 1):
                        rises = at(ray, (1 - 2 * sign) * float(radius), block=each) - base
                        table[sign, r, g, d] = rises[:images]
    return table, drawing / (len(blocks) * DIRECTIONS)


def _sizes(landscape: Landscape) -> list[int]:
    fitting = [size for size in SIZES if size <= landscape.num_samples // 2]
    return fitting or [landscape.num_samples]


def _time(landscape: Landscape, size: int, seed: int) -> float:
    """Return the seconds of one evaluation of a block, the better of two."""
    gathered = landscape.gather(landscape.blocks(size, seed=seed)[0])
    with landscape.moving() as at:
        return min(_clocked(at, gathered, landscape) for _ in range(2))


def _clocked(at: Move, gathered: Gathered, landscape: Landscape) -> float:
    still = landscape.point
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
            visits = SAFETY * found.of_visit(size) / tolerance**2
            visits = min(visits, 1e9) if np.isfinite(visits) else 1e9
            options.append((visits * price, Plan(radius, 0 if size >= samples else size, paired, int(visits))))
    return min(options, key=lambda option: option[0])[1]


LOW, HIGH, PLACES = 0.01, 2.0, 6  # nats that automatic radii span, and how many there are


def span(sampler: Sampler) -> FloatArray:
    """Return radii between those where the loss rises by 0.01 and by 2 nats, evenly spaced in their logarithm.

    Found by bisection on eight rays of a block each; where the loss never rises so far, where it stops being finite.
    """
    landscape, rays = sampler.landscapes[0], 8
    blocks = landscape.blocks(2 * IMAGES, seed=sampler.seed)
    gathered = [landscape.gather(blocks[k % len(blocks)]) for k in range(rays)]
    drawn = [draw_ray(landscape, sampler.seed, -1 - k, normalisation=sampler.normalisation) for k in range(rays)]
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        bases = [at(ray, 0.0, block=each).mean() for ray, each in zip(drawn, gathered, strict=True)]

        def rise(radius: float) -> float:
            ends = [at(ray, radius, block=each).mean() for ray, each in zip(drawn, gathered, strict=True)]
            sampler.spent += sum(each.batch.size for each in gathered)
            return float(np.mean(ends) - np.mean(bases))

        unit = landscape.norm / reach(landscape, sampler.normalisation)
        ends = [_bisect(rise, target, unit) for target in (LOW, HIGH)]
    return np.asarray(np.geomspace(ends[0], ends[1], PLACES))


def _bisect(rise: Callable[[float], float], target: float, unit: float) -> float:
    low, high = -10.0, 6.0  # powers of 2 of the weights' norm
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(unit * 2**middle) < target else (low, middle)
    return float(unit * 2**low)
