"""The pilot: choice of block size, pairing and number of draws from a few directions on a few images.

Its draws are not part of the result, since the choice of the plan would bias it.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice

import numpy as np
from torch import Generator, Tensor

from flatlab.arguments import FloatArray, Normalisation, distances
from flatlab.errors import UserError
from flatlab.landscape.blocks import Block, Partition
from flatlab.landscape.evaluation import Move
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import check_normalisation, draw_direction, reach
from flatlab.metrics.flatness.sampler import MOST, SAFETY, Goal, Sampler, settled
from flatlab.metrics.units import Keep, forget
from flatlab.results.estimate import Components, components
from flatlab.results.sphere import Reach, SamplingPlan
from flatlab.seeds import base_seed

GROUPS, DIRECTIONS, IMAGES = 16, 4, 16  # 64 independent directions, each on a block of 16 images
FEWEST = 4 * IMAGES  # images below which a pilot costs more than it saves: each direction uses them all
SIZES = (4, 8, 16, 32, 64, 128, 256)  # block sizes tried
PARALLEL = (16, 64, 256, 1024)  # on a GPU, where a small block takes as long as a larger one
TIMED = 3  # timings of each size, of which the best is used: other processes may use the machine
SLACK = 1.05  # plans whose times differ by less take equally long, as far as timings tell: the fewest images are best
# Half the standard error of a pilot's variance over directions, as a share of it: where that variance seems to be zero,
# large blocks seem to cost nothing, and take several times as long as small ones.
UNSURE = 0.5 * (2 / (GROUPS * (DIRECTIONS - 1))) ** 0.5
SWEEPS = 3  # over the radii, in which plans are exchanged
Value = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Pilot:
    """Result of the pilot."""

    single: list[Components]  # for each radius
    paired: list[Components]
    alone: bool  # of one landscape: for a difference the variance over images is unknown
    mean: FloatArray  # (R,) rises
    seconds: dict[int, float]  # of evaluating a block, by its size
    gathering: dict[int, float]  # seconds of cutting it and picking its images
    drawing: float  # seconds of a direction


def run_pilot(
    landscapes: Sequence[Landscape], radii: FloatArray, *, seed: int, normalisation: Normalisation, value: Value
) -> Pilot:
    """Run the pilot: rises of single images at each radius, along separate directions and their opposites.

    Args:
        landscapes: one, or two to be compared.
        radii: (R,) above zero.
        seed: of the measurement.
        normalisation: of the directions.
        value: from rises (L, ...) of the landscapes to those of the estimated quantity.
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
        # Both signs have one distribution, and pairs are judged by the same rises.
        single=[components(table, np.tile(strata, (2, 1))) for table in np.concatenate(signed, axis=1)],
        paired=[components(table, strata) for table in both],
        alone=len(landscapes) == 1,
        mean=np.abs(np.stack(tables).mean(axis=(1, 3, 4, 5))).max(axis=0),
        seconds={size: sum(each[size][1] for each in clocked) for size in clocked[0]},
        gathering={size: sum(each[size][0] for each in clocked) for size in clocked[0]},
        drawing=drawing,
    )


def price(landscapes: Sequence[Landscape], radii: int, *, seed: int) -> int:
    """Return the number of images that a pilot forwards."""
    blocks, directions = _groups(landscapes[0], seed)
    rises = sum(block.size for block in blocks) * (1 + 2 * radii * directions)
    sizes = [blocks.sizes for blocks in _clocked_on(landscapes[0], seed).values()]
    return len(landscapes) * (rises + sum(int(each[turn % len(each)]) for each in sizes for turn in range(TIMED)))


def _groups(landscape: Landscape, seed: int) -> tuple[list[Block], int]:
    """Return blocks, and the number of directions for each of them, at least 64 in all."""
    blocks = list(islice(landscape.blocks(IMAGES, seed=seed), GROUPS))
    return blocks, -(-GROUPS * DIRECTIONS // len(blocks))


def _table(
    landscape: Landscape, radii: FloatArray, seed: int, normalisation: Normalisation
) -> tuple[FloatArray, float]:
    """Return the rises (2, R, G, D, n) of single images for both signs, and the seconds of drawing a direction."""
    blocks, directions = _groups(landscape, seed)
    images = min(block.size for block in blocks)
    table = np.zeros((2, len(radii), len(blocks), directions, images))
    ends, drawing = np.stack([radii, -radii]), 0.0
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        for g, block in enumerate(blocks):
            each = landscape.gather(block.by_sample())
            base = at(landscape.point, 0.0, block=each)
            for d in range(directions):
                start = time.perf_counter()
                direction = draw_direction(landscape, seed, -1 - g * directions - d, normalisation=normalisation)
                drawing += time.perf_counter() - start
                table[:, :, g, d] = (at(direction, ends, block=each) - base)[..., :images]
    return table, drawing / (len(blocks) * directions)


def _sizes(landscape: Landscape) -> list[int]:
    """Return the sizes that are tried: with room for a sample of each stratum, and for two blocks."""
    sizes = SIZES if landscape.device.type == "cpu" else PARALLEL
    least = min(len(landscape.strata), sizes[-1])
    fitting = [size for size in sizes if least <= size <= landscape.num_samples // 2]
    return fitting or [landscape.num_samples]


def _seconds(landscape: Landscape, seed: int) -> dict[int, tuple[float, float]]:
    """Return the seconds of picking and of evaluating a block, by its size.

    Sizes alternate, so that a temporary load of the machine affects all.
    """
    partitions, still = _clocked_on(landscape, seed), landscape.point
    with landscape.moving() as at:
        turns = [
            {size: _clocked(landscape, at, still, (blocks, turn)) for size, blocks in partitions.items()}
            for turn in range(TIMED)
        ]
    return {size: (min(turn[size][0] for turn in turns), min(turn[size][1] for turn in turns)) for size in partitions}


def _clocked_on(landscape: Landscape, seed: int) -> dict[int, Partition]:
    return {size: landscape.blocks(size, seed=seed) for size in _sizes(landscape)}


def _clocked(landscape: Landscape, at: Move, still: Tensor, which: tuple[Partition, int]) -> tuple[float, float]:
    (blocks, turn), start = which, time.perf_counter()
    gathered = landscape.gather(blocks[turn % len(blocks)])
    ready = time.perf_counter()
    at(still, 0.0, block=gathered)
    return ready - start, time.perf_counter() - ready


def plan(pilot: Pilot, radii: FloatArray, goal: Goal, samples: int) -> list[SamplingPlan]:
    """Return for each radius the block size, and whether to pair, that reach the goal in about the least time.

    Radii of one kind share their directions and blocks, which are drawn and picked once.
    """
    choices = [_options(pilot, index, float(radius), goal, samples) for index, radius in enumerate(radii)]
    fastest = _exchanged(min(zip(*choices, strict=True), key=_time_of), choices, _time_of)
    least = SLACK * _time_of(fastest)

    def images(chosen: Sequence[_Option]) -> float:
        return sum(each.images for each in chosen) if _time_of(chosen) <= least else float("inf")

    return [each.plan for each in _exchanged(fastest, choices, images)]


@dataclass(frozen=True)
class _Option:
    """A way to sample one radius, and its price: images, and seconds of evaluating, and of drawing and picking."""

    plan: SamplingPlan
    images: float
    evaluating: float
    drawing: float


def _options(pilot: Pilot, index: int, radius: float, goal: Goal, samples: int) -> list[_Option]:
    tolerance = goal.tolerance(float(pilot.mean[index]))
    options = []
    for paired, found in ((False, pilot.single[index]), (True, pilot.paired[index])):
        cautious = replace(found, directions=found.directions + UNSURE * found.of_draw(IMAGES))
        for size, seconds in pilot.seconds.items():
            ends, blocks = 2 if paired else 1, max(1, round(samples / size))
            between = found.between(size) if pilot.alone else 0.0
            likely, count = (foresee(each, size, blocks, tolerance, between) for each in (found, cautious))
            foreseen = likely if likely < MOST else 0  # not finite, or too many: decided while sampling
            chosen = SamplingPlan(radius, 0 if size >= samples else size, paired, foreseen, between)
            shared = pilot.drawing + pilot.gathering[size]
            options.append(_Option(chosen, count * size * ends, count * seconds * ends, count * shared))
    return options


def _time_of(chosen: Sequence[_Option]) -> float:
    drawing: dict[tuple[int, bool], float] = {}
    for each in chosen:
        kind = each.plan.block_size, each.plan.paired
        drawing[kind] = max(drawing.get(kind, 0.0), each.drawing)
    return sum(each.evaluating for each in chosen) + sum(drawing.values())


def _exchanged(
    chosen: Sequence[_Option], choices: Sequence[Sequence[_Option]], cost: Callable[[Sequence[_Option]], float]
) -> Sequence[_Option]:
    """Return the choice after exchanges of one option at a time that lower the cost."""
    least = cost(chosen)
    for _ in range(SWEEPS):
        for index, options in enumerate(choices):
            for option in options:
                other = [*chosen[:index], option, *chosen[index + 1 :]]
                if (price := cost(other)) < least:
                    chosen, least = other, price
    return chosen


def foresee(found: Components, size: int, blocks: int, tolerance: float, between: float) -> int:
    """Return the number of draws that reach the tolerance: fewer than one round over the images if that suffices."""
    wanted, long = max(tolerance**2 / SAFETY, sys.float_info.min), found.of_draw(size)
    whole = long + found.images / size
    short, long = whole / (wanted + between * whole / blocks), long / wanted
    if short < blocks:
        return settled(int(short), blocks, size)
    return settled(max(int(long), blocks), blocks, size) if long < MOST else MOST


LOW, HIGH, PLACES = 0.01, 2.0, 6  # range of rises (nats) of automatic radii, and their number
PAIRS, STEPS = 8, 12  # pairs of directions used to find them, each on a block, and steps of a bisection
KEPT = 2**20  # parameters up to which these directions are held; larger ones are drawn again at each radius
OCTAVES = (-10.0, 6.0)  # powers of 2 of the weights' norm that are searched
BETWEEN = 9  # places between which the rise is interpolated
Rise = Callable[[float], float]


def span(sampler: Sampler) -> FloatArray:
    """Return radii between those where the loss rises by 0.01 and by 2 nats, evenly spaced in their logarithm.

    Found by bisection on eight pairs of directions; if the loss never rises by 2 nats, up to where it is not finite.
    """
    with _rising(sampler) as rise:
        low, high = (_bisect(rise, target, _unit(sampler)) for target in (LOW, HIGH))
        return np.asarray(np.geomspace(low, high, PLACES))


def reached(sampler: Sampler, rises: Sequence[float]) -> FloatArray:
    """Return the radii (R,) at which the loss rises by given amounts (nats), found on eight pairs of directions.

    The first and the last by bisection; between them the rise is interpolated in logarithms, where a quadratic one is
    a straight line.

    Args:
        sampler: of the measurement.
        rises: (R,) above zero, ascending.

    Raises:
        UserError: if the loss does not rise as far.
    """
    with _rising(sampler) as rise:
        low, high = (_bisect(rise, target, _unit(sampler)) for target in (rises[0], rises[-1]))
        high *= 2 ** ((OCTAVES[1] - OCTAVES[0]) / 2**STEPS)  # the next place of the bisection: the rise is reached
        places = np.geomspace(low, high, BETWEEN)
        found = np.array([rise(place) for place in places])
    if not found[-1] >= rises[-1]:
        raise UserError(
            f"The loss must rise by {rises[-1]:g} nats around the reference runs, got {np.nanmax(found):.2g} within"
            f" {2 ** OCTAVES[1]:g} times the length of the weights: give smaller rises, or radii."
        )
    known = np.log(np.maximum(np.maximum.accumulate(found), np.finfo(float).tiny))
    return np.asarray(np.exp(np.interp(np.log(rises), known, np.log(places))))


def radii_at_rises(
    landscape: Landscape,
    rises: Sequence[float],
    *,
    normalisation: Normalisation = "none",
    seed: int | Generator = 0,
    keep: Keep = forget,
) -> Reach:
    """Return the radii at which the mean loss rises by given amounts, such as radii that several models share.

    Args:
        landscape: around whose point.
        rises: (R,) in nats, above zero, increasing.
        normalisation: of the directions, as in `sphere_flatness`.
        seed: of the directions and the blocks.
        keep: stores units, which makes the measurement resumable.

    Raises:
        UserError: if the rises are not above zero and increasing, or the loss does not rise as far.
    """
    if (np.diff([0.0, *distances("rises", rises)]) <= 0).any():
        raise UserError(f"rises must be numbers > 0 in increasing order, got {list(rises)}.")
    sampler = Sampler([landscape], base_seed(seed), check_normalisation(normalisation, landscape), keep=keep)
    (radii,) = sampler.keep([("reach", partial(reached, sampler, rises))])
    return Reach(radii=radii, rises=tuple(rises), strata=landscape.strata, images=reached_price(sampler))


@contextmanager
def _rising(sampler: Sampler) -> Iterator[Rise]:
    """Yield the mean rise at a radius along eight pairs of directions, each on a block."""
    landscape = sampler.landscapes[0]
    gathered = [landscape.gather(block) for block in _spanned(sampler)]

    @lru_cache(PAIRS if landscape.num_params <= KEPT else 0)
    def drawn(k: int) -> Tensor:
        return draw_direction(landscape, sampler.seed, -1 - k, normalisation=sampler.normalisation)

    with landscape.moving() as at, np.errstate(invalid="ignore"):

        def mean(radii: float | list[float]) -> float:
            return float(np.mean([at(drawn(k), radii, block=each).mean() for k, each in enumerate(gathered)]))

        base = mean(0.0)

        def rise(radius: float) -> float:
            return mean([radius, -radius]) - base

        yield rise


def _unit(sampler: Sampler) -> float:
    """Return the radius whose Euclidean distance is the length of the weights; if that is 0, a step of 1 in each."""
    landscape, length = sampler.landscapes[0], sampler.landscapes[0].norm
    return length / reach(landscape, sampler.normalisation) if length else landscape.num_params**0.5


def span_price(sampler: Sampler) -> int:
    """Return the number of images that `span` forwards."""
    return sum(block.size for block in _spanned(sampler)) * (1 + 2 * 2 * STEPS)


def reached_price(sampler: Sampler) -> int:
    """Return the number of images that `reached` forwards."""
    return sum(block.size for block in _spanned(sampler)) * (1 + 2 * (2 * STEPS + BETWEEN))


def _spanned(sampler: Sampler) -> list[Block]:
    blocks = sampler.landscapes[0].blocks(2 * IMAGES, seed=sampler.seed)
    return [blocks[k % len(blocks)] for k in range(PAIRS)]


def _bisect(rise: Rise, target: float, unit: float) -> float:
    low, high = OCTAVES
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(unit * 2**middle) < target else (low, middle)
    return float(unit * 2**low)
