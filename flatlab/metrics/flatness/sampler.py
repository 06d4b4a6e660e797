"""The sampler: evaluates directions on blocks of images, in units that can be stored, until the goal is reached.

Draw j (a "visit" in the arrays) takes direction j and evaluates block j mod B at each radius (and in the opposite
direction, if the plan pairs) and at w. The crossed design of SWAD's script is the case B = 1: each direction on all
images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from flatlab.arguments import FloatArray, Normalisation
from flatlab.landscape.blocks import Partition
from flatlab.landscape.evaluation import Move
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import Noise, draw_direction
from flatlab.metrics.units import Keep, forget
from flatlab.results.estimate import Estimate, estimate
from flatlab.results.sphere import SamplingPlan
from flatlab.seeds import derive

MOST = 10**7  # draws that can be foreseen
UNIT, LARGEST = 8, 32  # smallest and largest number of draws of a unit, in which work is resumed and shared
# Freedom of the spread at the first look: with 16, skewed draws stopped too early (coverage 0.92; 48: 0.935). Blocks of
# fewer than 16 images are more skewed, and need as many images.
FREEDOM, SKEWED = 80, 16
SAFETY = 1.1  # draws relative to those of the variance estimate, so that most measurements need one look less


@dataclass(frozen=True)
class Goal:
    """When sampling stops: standard error at most max(relative |F|, absolute), or the budget is spent."""

    relative: float = 0.02
    absolute: float = 1e-4  # nats
    budget: float = float("inf")  # images forwarded in all
    draws: int | None = None  # fixed number of them, instead of an accuracy target

    def tolerance(self, scale: float) -> float:
        """Return the allowed standard error of a value of this size."""
        return max(self.relative * abs(scale), self.absolute)


def settled(count: int, blocks: int, size: int) -> int:
    """Return the number of draws, increased if their variance would not be known well enough.

    Before a full round over the blocks that is the variance of all draws, with images as sampled; after it that within
    blocks.

    Args:
        count: that the variance asks for.
        blocks: how many there are.
        size: images of a block; 0 if it has all.
    """
    freedom = FREEDOM * max(1, SKEWED // size) if size else FREEDOM
    return max(count, freedom + 1) if max(count, freedom + 1) < blocks else max(count, blocks + freedom)


@dataclass
class Draws:
    """The draws at one radius so far."""

    plan: SamplingPlan
    blocks: int
    visits: FloatArray  # (L, J, S): landscapes, draws, strata
    stopped: str = ""  # "accuracy", "samples", "budget", "nonfinite" or "interrupted"


DrawsReport = Callable[[list[Draws]], None]
"""Called with the draws at each radius, after each unit."""


@dataclass
class Group:
    """Radii that are still sampled by one plan, with common directions and blocks."""

    active: list[Draws]
    done: int = 0  # draws
    look: int = 0  # draws at which it pauses next
    spent: float = 0.0  # images

    @property
    def plans(self) -> list[SamplingPlan]:
        """Of the active radii."""
        return [draws.plan for draws in self.active]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.active[0].blocks

    @property
    def foreseen(self) -> int:
        """The number of draws after which the first radius should be accurate; accuracy is not judged before."""
        return min(plan.visits for plan in self.plans)


@dataclass
class Sampler:
    """Samples one or several landscapes along common directions, over common blocks.

    Args:
        landscapes: of models of one architecture, on the same data.
        seed: seed of the directions and the partition.
        normalisation: of the directions.
        value: from the mean over strata (L, J) to the draws (J,) of the estimated quantity.
        keep: stores units.
        noise: distribution of the directions before normalisation.
        like: a vector (P,) whose norms replace those of the weights.
    """

    landscapes: Sequence[Landscape]
    seed: int
    normalisation: Normalisation
    value: Callable[[FloatArray], FloatArray] = lambda rises: rises[0]
    keep: Keep = forget
    noise: Noise = "sphere"
    like: Tensor | None = None
    spent: float = 0.0  # images forwarded as by a single process: a budget does not depend on how work is shared
    _partitions: dict[tuple[int, int], Partition] = field(default_factory=dict)
    _bases: dict[tuple[int, int, int], FloatArray] = field(default_factory=dict)
    _rested: dict[int, int] = field(default_factory=dict)  # draws whose block is evaluated at w, by block size

    def run(self, plans: Sequence[SamplingPlan], goal: Goal, *, report: DrawsReport | None = None) -> list[Draws]:
        """Sample each radius by its plan until the goal is reached; radii of one plan share their directions."""
        shape = (len(self.landscapes), 0, len(self.landscapes[0].strata))
        per_radius = [Draws(plan, len(self._sizes(plan.block_size)), np.zeros(shape)) for plan in plans]
        kinds: dict[tuple[int, bool], list[Draws]] = {}
        for draws in per_radius:
            kinds.setdefault((draws.plan.block_size, draws.plan.paired), []).append(draws)
        groups = [Group(list(each)) for each in kinds.values()]
        try:
            # In turns, the cheapest so far first: all radii have an interval soon, and similar shares of the budget.
            while running := [group for group in groups if group.active]:
                share = (goal.budget - self.spent) / len(running)
                self._turn(
                    min(running, key=lambda g: g.spent), share, goal, lambda: report(per_radius) if report else None
                )
        except KeyboardInterrupt:
            for draws in per_radius:
                draws.stopped = draws.stopped or "interrupted"
        return per_radius

    def estimate(self, draws: Draws) -> Estimate:
        """Return the estimate at a radius, with its standard error."""
        return estimate(self.value(draws.visits.mean(axis=2)), draws.blocks, draws.plan.between)

    def scale(self, draws: Draws) -> float:
        """Return the largest of the landscapes' values, which a relative error refers to."""
        return max(abs(estimate(rises, draws.blocks).value) for rises in draws.visits.mean(axis=2))

    def _turn(self, group: Group, budget: float, goal: Goal, notify: Callable[[], None]) -> None:
        """Continue to the next look, or until the budget is spent."""
        group.look = self._next_look(group, goal)
        prices = np.cumsum(self._prices(group, range(group.done, group.look)))
        stop = group.done + int(np.searchsorted(prices, budget, side="right"))
        self._extend(group, range(group.done, stop), notify)
        for draws in group.active:
            draws.stopped = self._verdict(draws, group, goal)
        group.active = [draws for draws in group.active if not draws.stopped]

    def _verdict(self, draws: Draws, group: Group, goal: Goal) -> str:
        """Return why sampling of a radius stops here, or an empty string."""
        if goal.draws and group.done == goal.draws:
            return "samples"
        found = self.estimate(draws)
        if group.done and not goal.draws and not np.isfinite(found.value):
            return "nonfinite"  # no further draw would change that
        judged = group.done == group.look >= group.foreseen
        if judged and found.stderr <= goal.tolerance(self.scale(draws)):
            return "accuracy"
        return "" if group.done == group.look else "budget"

    def _next_look(self, group: Group, goal: Goal) -> int:
        """Return the number of draws at the next look: that foreseen, then up to twice as many, by the variance."""
        if goal.draws:
            return goal.draws
        count = group.foreseen
        if group.done >= count:
            excess = [self.estimate(draws).stderr / goal.tolerance(self.scale(draws)) for draws in group.active]
            least = min((SAFETY * group.done * each**2 for each in excess if np.isfinite(each)), default=np.inf)
            count = max(int(min(least, MOST)), group.done + 1)
        count = settled(min(count, 2 * group.done), group.blocks, group.plans[0].block_size)
        unit = group.blocks * max(1, UNIT // group.blocks) if group.blocks <= LARGEST else UNIT
        return -(-count // unit) * unit

    def _prices(self, group: Group, which: range) -> FloatArray:
        """Return the images that each draw forwards, including those at w at the first draw of a block."""
        size, ends = group.plans[0].block_size, len(group.active) * (2 if group.plans[0].paired else 1)
        numbers = np.arange(which.start, which.stop)
        first = (numbers >= self._rested.get(size, 0)) & (numbers < group.blocks)
        images = self._sizes(size)[numbers % group.blocks]
        return np.asarray(len(self.landscapes) * images * (ends + first), dtype=float)

    def _extend(self, group: Group, which: range, notify: Callable[[], None]) -> None:
        """Evaluate draws at the active radii, in units, and append them."""
        plans, length = group.plans, min(max(group.blocks, UNIT), LARGEST)
        radii = derive(*[plan.radius for plan in plans])
        kind = f"{plans[0].block_size}{'p' if plans[0].paired else ''}-{radii:016x}"
        parts = [range(start, min(start + length, which.stop)) for start in range(which.start, which.stop, length)]
        units = [(f"{kind}_{part.start}-{part.stop}", partial(self.evaluate, plans, part)) for part in parts]
        for part, rises in zip(parts, self.keep(units), strict=True):
            price = float(self._prices(group, part).sum())
            for index, draws in enumerate(group.active):
                draws.visits = np.concatenate([draws.visits, rises[:, :, index]], axis=1)
            self.spent, group.spent, group.done = self.spent + price, group.spent + price, part.stop
            self._rested[plans[0].block_size] = max(self._rested.get(plans[0].block_size, 0), part.stop)
            notify()

    def evaluate(self, plans: Sequence[SamplingPlan], numbers: range) -> FloatArray:
        """Return the rises (L, J, R, S) of some draws, at the radii of plans of one kind."""
        rises = np.zeros((len(self.landscapes), len(numbers), len(plans), len(self.landscapes[0].strata)))
        for which, landscape in enumerate(self.landscapes):  # one is moved at a time: they may share parameters
            with landscape.moving() as at, np.errstate(invalid="ignore"):
                for row, number in enumerate(numbers):
                    rises[which, row] = self._evaluate(which, at, plans, number)
        return rises

    def _evaluate(self, which: int, at: Move, plans: Sequence[SamplingPlan], number: int) -> FloatArray:
        landscape, size = self.landscapes[which], plans[0].block_size
        if not size:
            return np.asarray(self.losses(which, at, plans, number) - landscape.base_loss)
        partition = self._partition(which, size)
        index = number % len(partition)
        block = landscape.gather(partition[index])
        if (which, size, index) not in self._bases:
            self._bases[which, size, index] = at(landscape.point, 0.0, block=block)
        return np.asarray(self.losses(which, at, plans, number, block=block) - self._bases[which, size, index])

    def losses(self, which: int, at: Move, plans: Sequence[SamplingPlan], number: int, **where: Any) -> FloatArray:
        """Return the losses (R, S) along a direction, at the radii of plans of one kind; of a pair the mean."""
        direction = draw_direction(
            self.landscapes[which],
            self.seed,
            number,
            normalisation=self.normalisation,
            noise=self.noise,
            like=self.like,
        )
        signs = (1.0, -1.0) if plans[0].paired else (1.0,)
        radii = np.array([[sign * plan.radius for sign in signs] for plan in plans])
        return np.asarray(at(direction, radii, **where).mean(axis=1))

    def _sizes(self, block_size: int) -> FloatArray:
        """Return the number of images of each block."""
        if not block_size:
            return np.array([self.landscapes[0].num_samples], dtype=float)
        return self._partition(0, block_size).sizes.astype(float)

    def _partition(self, which: int, block_size: int) -> Partition:
        """Return a landscape's blocks; those of other landscapes contain the same images, for any batch sizes."""
        if (which, block_size) not in self._partitions:
            self._partitions[which, block_size] = self.landscapes[which].blocks(block_size, seed=self.seed)
        return self._partitions[which, block_size]


def counts(per_radius: Sequence[Draws]) -> tuple[int, int]:
    """Return the number of draws so far, and the number foreseen."""
    seen = [(draws, draws.visits.shape[1]) for draws in per_radius]
    made = sum(count for _, count in seen)
    return made, max(made, sum(count if draws.stopped else max(draws.plan.visits, count + 1) for draws, count in seen))
