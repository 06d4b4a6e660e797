"""The sampler: visits of directions to blocks of images, in units that can be kept as files, until accuracy is reached.

A *visit* j draws ray j, walks to each radius (and to its antithesis, where the plan pairs) and evaluates block j mod B
there and at w. The crossed design of SWAD's script is the same with B = 1: each ray meets all images.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from flatlab.blocks import Block
from flatlab.landscape import Landscape, Move
from flatlab.metrics.rays import Normalisation, draw_ray
from flatlab.metrics.results import Estimate, FloatArray
from flatlab.metrics.rounds import estimate

UNIT = 8  # visits of a unit, at least: the grain of resuming and sharing
SAFETY = 1.1  # more visits than a variance estimate asks for, so that most measurements need one look less


@dataclass(frozen=True)
class Plan:
    """How one radius is sampled."""

    radius: float
    block_size: int  # images of a visit; 0 is all of them, the crossed design
    paired: bool = False  # each direction with its antithesis, in the same block
    visits: int = 0  # foreseen


@dataclass(frozen=True)
class Goal:
    """When sampling stops: standard error at most max(relative |F|, absolute), or the budget is spent."""

    relative: float = 0.02
    absolute: float = 1e-4  # nats
    budget: float = float("inf")  # images forwarded in all
    visits: int | None = None  # exactly so many instead: no accuracy is asked for

    def tolerance(self, scale: float) -> float:
        """Return the standard error that is asked for at a value of this size."""
        return max(self.relative * abs(scale), self.absolute)


Unit = tuple[str, Callable[[], FloatArray]]
"""A piece of work that can be kept: its name, and what computes it from nothing but that name and the seed."""
Keep = Callable[[Sequence[Unit]], Iterator[FloatArray]]
"""Yields the arrays of units, in their order: as kept before, or computed (by whoever comes first) and kept."""


def forget(units: Sequence[Unit]) -> Iterator[FloatArray]:
    """Compute units one after the other, and keep nothing."""
    return (compute() for _, compute in units)


@dataclass
class Walk:
    """What one radius has seen so far."""

    plan: Plan
    blocks: int
    visits: FloatArray  # (L, J, S): landscapes, visits, strata
    stopped: str = ""  # "accuracy", "samples", "budget" or "interrupted"


Report = Callable[[list[Walk]], None]
"""Called with what each radius has seen, after each unit of visits."""


@dataclass
class Sampler:
    """Samples one or several landscapes along common rays, over common blocks.

    Args:
        landscapes: of models of one architecture, on the same data.
        seed: names the rays and the partition.
        normalisation: of the rays.
        value: from the mean over strata (L, J) to the visits (J,) of the number that is sought.
        keep: keeps units.
    """

    landscapes: Sequence[Landscape]
    seed: int
    normalisation: Normalisation
    value: Callable[[FloatArray], FloatArray] = lambda rises: rises[0]
    keep: Keep = forget
    spent: float = 0.0  # images forwarded
    _partitions: dict[int, list[Block]] = field(default_factory=dict)
    _bases: dict[tuple[int, int, int], FloatArray] = field(default_factory=dict)

    def run(self, plans: Sequence[Plan], goal: Goal, *, report: "Report | None" = None) -> list[Walk]:
        """Sample each radius by its plan until the goal is reached; radii of one plan share their rays."""
        shape = (len(self.landscapes), 0, len(self.landscapes[0].strata))
        walks = [Walk(plan, self.blocks(plan.block_size), np.zeros(shape)) for plan in plans]
        groups: dict[tuple[int, bool], list[Walk]] = {}
        for walk in walks:
            groups.setdefault((walk.plan.block_size, walk.plan.paired), []).append(walk)
        try:
            for group in groups.values():
                self._sample(group, goal, lambda: report(walks) if report else None)
        except KeyboardInterrupt:
            for walk in walks:
                walk.stopped = walk.stopped or "interrupted"
        return walks

    def blocks(self, block_size: int) -> int:
        """Return how many blocks a block size makes."""
        return len(self._partition(block_size)) if block_size else 1

    def estimate(self, walk: Walk) -> Estimate:
        """Return the number that is sought at a radius, with its standard error."""
        return estimate(self.value(walk.visits.mean(axis=2)), walk.blocks)

    def _sample(self, group: list[Walk], goal: Goal, tell: Callable[[], None]) -> None:
        blocks, active, done = group[0].blocks, list(group), 0
        unit = blocks * max(1, UNIT // blocks)
        look = goal.visits or self._first_look(group, unit)
        while active:
            stop = min(look, done + self._affordable(active, goal))
            self._extend(active, range(done, stop), unit, tell)
            if stop < look:
                return self._stop(active, "budget")
            if goal.visits:
                return self._stop(active, "samples")
            done = stop
            for walk in active:
                walk.stopped = "accuracy" if self._reached(walk, goal) else ""
            active = [walk for walk in active if not walk.stopped]
            look = self._next_look(active, goal, done, unit)

    def _first_look(self, group: list[Walk], unit: int) -> int:
        foreseen = min(walk.plan.visits for walk in group)
        rounds = max(2, -(-foreseen // group[0].blocks))  # two rounds, so that each block is seen twice
        return max(rounds * group[0].blocks, 32 if group[0].blocks < 32 else 0, unit)

    def _next_look(self, active: list[Walk], goal: Goal, done: int, unit: int) -> int:
        """Look again where the present variance says that the goal lies, after at most twice as many visits."""
        if not active:
            return done
        excess = [self.estimate(walk).stderr / goal.tolerance(self.scale(walk)) for walk in active]
        least = min((SAFETY * done * each**2 for each in excess if np.isfinite(each)), default=2.0 * done)
        return min(2 * done, -(-max(int(least), done + unit) // unit) * unit)

    def scale(self, walk: Walk) -> float:
        """Return the largest of the landscapes' values, which a relative error refers to."""
        return max(abs(estimate(rises, walk.blocks).value) for rises in walk.visits.mean(axis=2))

    def _reached(self, walk: Walk, goal: Goal) -> bool:
        return bool(self.estimate(walk).stderr <= goal.tolerance(self.scale(walk)))

    def _affordable(self, active: list[Walk], goal: Goal) -> int:
        price = self._price(active)
        left = (goal.budget - self.spent) / price
        return 10**9 if np.isinf(left) else max(0, int(left))

    def _price(self, active: list[Walk]) -> float:
        """Return the images that one visit of these radii forwards."""
        plan = active[0].plan
        images = plan.block_size or self.landscapes[0].num_samples
        return len(self.landscapes) * images * len(active) * (2 if plan.paired else 1)

    def _stop(self, active: list[Walk], why: str) -> None:
        for walk in active:
            walk.stopped = why

    def _extend(self, active: list[Walk], visits: range, unit: int, tell: Callable[[], None]) -> None:
        """Make visits to the active radii, in units, and add them to what these have seen."""
        plans = [walk.plan for walk in active]
        kind = f"{plans[0].block_size}{'p' if plans[0].paired else ''}-{'-'.join(f'{plan.radius:g}' for plan in plans)}"
        parts = [range(start, min(start + unit, visits.stop)) for start in range(visits.start, visits.stop, unit)]
        units = [(f"{kind}_{part.start}-{part.stop}", partial(self.walk, plans, part)) for part in parts]
        for rises in self.keep(units):
            for index, walk in enumerate(active):
                walk.visits = np.concatenate([walk.visits, rises[:, :, index]], axis=1)
            self.spent += rises.shape[1] * self._price(active)
            tell()

    def walk(self, plans: Sequence[Plan], visits: range) -> FloatArray:
        """Return the rises (L, J, R, S) along the rays of some visits, at the radii of plans of one kind."""
        rises = np.zeros((len(self.landscapes), len(visits), len(plans), len(self.landscapes[0].strata)))
        with _moving(self.landscapes) as movers, np.errstate(invalid="ignore"):
            for row, visit in enumerate(visits):
                for column, (landscape, at) in enumerate(zip(self.landscapes, movers, strict=True)):
                    rises[column, row] = self._visit(landscape, at, plans, visit)
        return rises

    def _visit(self, landscape: Landscape, at: Move, plans: Sequence[Plan], visit: int) -> FloatArray:
        ray = draw_ray(landscape, self.seed, visit, normalisation=self.normalisation)
        signs = (1.0, -1.0) if plans[0].paired else (1.0,)
        if not plans[0].block_size:
            block, base = None, landscape.base_loss
        else:
            partition = self._partition(plans[0].block_size)
            index = visit % len(partition)
            block = landscape.gather(partition[index])
            key = (id(landscape), plans[0].block_size, index)
            if key not in self._bases:
                self._bases[key] = at(ray, 0.0, block=block)
                self.spent += block.batch.size
            base = self._bases[key]
        ends = [[at(ray, sign * plan.radius, block=block) for sign in signs] for plan in plans]
        return np.asarray(np.mean(ends, axis=1) - base)

    def _partition(self, block_size: int) -> list[Block]:
        if block_size not in self._partitions:
            self._partitions[block_size] = self.landscapes[0].blocks(block_size, seed=self.seed)
        return self._partitions[block_size]


@contextmanager
def _moving(landscapes: Sequence[Landscape]) -> Iterator[list[Move]]:
    with ExitStack() as stack:
        yield [stack.enter_context(landscape.moving()) for landscape in landscapes]
