"""Are two checkpoints connected by a straight line of low loss? The height of the barrier, with an interval.

The maximum along a path is biased upwards, since it picks its own noise. So the place is chosen on one half of the
images, and the barrier is read there on the other half.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatlab.blocks import Block
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.results import Cost, Estimate, FloatArray, Report, Sampled
from flatlab.nests import Batch, Data, read
from flatlab.seeds import base_seed, derive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK = 128  # images that are evaluated together
FEWEST = 4  # images of a stratum: two in each half
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True, eq=False, kw_only=True)
class Connection(Sampled):
    """The loss along the straight line between two checkpoints.

    Attributes:
        places: (T,) from 0, the first checkpoint, to 1, the second.
        losses: (T, S) mean loss of each stratum, over all images.
        position: the place of the barrier, chosen on one half of the images.
        excess: (n,) of each image of the other half: its loss there, less the linear interpolation of its losses at
            the ends.
        stratum: (n,) of these images; strata weigh equally.
        bootstrap: (B,) the barrier on images drawn again with replacement, within the strata.
        strata: (S,) names.
        statistics: "interpolated" or "recomputed": BatchNorm's running statistics along the line.
        seed: of the halves and the bootstrap.
    """

    places: FloatArray
    losses: FloatArray
    position: float
    excess: FloatArray
    stratum: npt.NDArray[np.int64]
    bootstrap: FloatArray
    strata: tuple[str, ...]
    statistics: str
    seed: int

    over: ClassVar[str] = "images"

    @property
    def barrier(self) -> float:
        """The height in nats; negative where the loss lies below the interpolation of the ends everywhere."""
        return float(self.value[0])

    @property
    def estimates(self) -> list[Estimate]:
        """The height, with its standard error over images."""
        height = float(_by_stratum(self.excess[None], self.stratum).mean())
        with np.errstate(invalid="ignore"):
            return [Estimate(height, float(self.bootstrap.std(ddof=1)), len(self.excess) - 1)]

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Return the percentile interval (low, high), each (1,), of the paired bootstrap over images."""
        self.estimates[0].half_width(level)  # refuses a level that is none
        low, high = np.quantile(self.bootstrap, [(1 - level) / 2, (1 + level) / 2])
        return np.array([low]), np.array([high])

    @property
    def raw(self) -> list[FloatArray]:
        """The excess of each image."""
        return [self.excess]

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The place of the barrier."""
        return "position", np.array([self.position])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the loss along the line, the interpolation of its ends, and the barrier with its interval."""
        import matplotlib.pyplot as plt

        axes = plt.subplots()[1] if ax is None else ax
        curve = self.losses.mean(axis=1)
        axes.plot(self.places, curve)
        axes.plot([0, 1], curve[[0, -1]], "--", color="0.5", lw=0.8)
        foot = curve[0] + self.position * (curve[-1] - curve[0])
        low, high = (float(end[0]) for end in self.interval())
        label = f"barrier {self.barrier:.3g} [{low:.3g}, {high:.3g}] nats"
        axes.plot([self.position] * 2, [foot, foot + self.barrier], color="C3", marker="_", label=label)
        axes.set(xlabel="place between the checkpoints", ylabel="loss (nats)")
        axes.legend()
        return axes


def connect(
    first: Landscape,
    second: Landscape,
    *,
    grid: int = 21,
    recompute: Data | None = None,
    seed: int | torch.Generator = 0,
    report: Report | None = None,
) -> Connection:
    """Measure the barrier between two checkpoints: the largest height of the loss above the line between its ends.

    Definition: Frankle et al. 2020, section 2 (error barrier), in nats.

    Args:
        first: the landscape of one end.
        second: that of the other, of the same architecture over the same data.
        grid: places along the line, the ends included.
        recompute: batches, as of training, from which BatchNorm's running statistics are computed anew at each place
            (Izmailov et al. 2018). Else they are interpolated like the weights: both ends are the checkpoints.
        seed: of the halves and the bootstrap.
        report: called with the places done and foreseen.

    Raises:
        UserError: where the two are of different models or data, or there are too few places or images.
    """
    start, name = time.perf_counter(), base_seed(seed)
    _check(first, second, grid)
    path = first.around(copy.deepcopy(first.model))  # whose statistics may change
    moved = _Statistics(
        path.model, second.model, None if recompute is None else read("recompute", recompute, _at(path))
    )
    places = np.arange(grid) / (grid - 1)
    table, stratum = _losses(path, second.as_point(second.point) - first.point, places, moved, report)
    chosen = np.isin(np.arange(len(stratum)), _half(stratum, name))
    with np.errstate(invalid="ignore"):  # what is not finite is shown so
        excess = table - (1 - places[:, None]) * table[0] - places[:, None] * table[-1]
    position = _highest(excess[:, chosen], stratum[chosen])
    kept, home = excess[position, ~chosen], stratum[~chosen]
    return Connection(
        places=places,
        losses=_by_stratum(table, stratum),
        position=float(places[position]),
        excess=kept,
        stratum=home,
        bootstrap=_bootstrap(kept, home, name),
        strata=first.strata,
        statistics="interpolated" if recompute is None else "recomputed",
        seed=name,
        cost=Cost(float(grid), grid * first.num_samples, 0, time.perf_counter() - start),
    )


def _check(first: Landscape, second: Landscape, grid: int) -> None:
    shapes = [[tensor.shape for tensor in each.split(each.point)] for each in (first, second)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "A line between two checkpoints needs models of one architecture, but their parameters have other shapes"
            f" ({first.num_params:,} and {second.num_params:,} numbers)."
        )
    if not first.shares_data(second):
        raise UserError("A line between two checkpoints needs the same data in the same order: hand in the same.")
    if grid < 3:
        raise UserError(f"A barrier lies between the ends, so that the grid needs at least 3 places, but has {grid}.")
    if first.sizes.min() < FEWEST:
        raise UserError(f"Each stratum is cut in halves, and needs at least {FEWEST} images, but one has fewer.")


def _at(landscape: Landscape) -> torch.device:
    return landscape.point.device


def _losses(
    path: Landscape, step: Tensor, places: FloatArray, moved: "_Statistics", report: Report | None
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the loss (T, N) of each image at each place, and the images' strata (N,)."""
    blocks = path.blocks(BLOCK)
    singles = [block.by_sample() for block in blocks]
    scales = np.concatenate([[part.scale for part in single.parts] for single in singles])
    table = []
    with path.moving(settle=moved.settle) as at, np.errstate(invalid="ignore"):
        for done, place in enumerate(places.tolist(), start=1):
            moved.place(place)
            table.append(np.concatenate([at(step, place, block=path.gather(single)) for single in singles]) / scales)
            if report:
                report(done, len(places))
    return np.stack(table), np.concatenate([_strata(block) for block in blocks])


def _strata(block: Block) -> npt.NDArray[np.int64]:
    return np.repeat([part.row for part in block.parts], [part.stop - part.start for part in block.parts])


def _by_stratum(table: FloatArray, stratum: npt.NDArray[np.int64]) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return np.stack([table[:, stratum == s].mean(axis=1) for s in range(stratum.max() + 1)], axis=1)


def _half(stratum: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Return half of the images of each stratum."""
    rng = np.random.default_rng(derive("connectivity", "halves", seed))
    halves = []
    for s in range(stratum.max() + 1):
        mine = rng.permutation(np.flatnonzero(stratum == s))
        halves.append(mine[: len(mine) // 2])
    return np.concatenate(halves)


def _highest(excess: FloatArray, stratum: npt.NDArray[np.int64]) -> int:
    """Return the place between the ends where the mean over strata is largest, or no number."""
    means = _by_stratum(excess, stratum).mean(axis=1)
    return 1 + int(np.argmax(np.nan_to_num(means[1:-1], nan=np.inf)))


def _bootstrap(excess: FloatArray, stratum: npt.NDArray[np.int64], seed: int) -> FloatArray:
    rng = np.random.default_rng(derive("connectivity", "bootstrap", seed))
    means = []
    with np.errstate(invalid="ignore"):
        for s in range(stratum.max() + 1):
            mine = excess[stratum == s]
            means.append([mine[rng.integers(len(mine), size=len(mine))].mean() for _ in range(DRAWS)])
        return np.asarray(np.mean(means, axis=0))


class _Statistics:
    """Moves BatchNorm's running statistics of a model along with its weights, and all other buffers of floats.

    Args:
        model: a private copy of the first.
        other: the second model.
        batches: to compute statistics from, instead of interpolating them.
    """

    def __init__(self, model: nn.Module, other: nn.Module, batches: Sequence[Batch] | None) -> None:
        self.model, self.batches = model, batches
        theirs = dict(other.named_buffers())
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = [
            (mine, mine.clone(), theirs[name]) for name, mine in model.named_buffers() if mine.is_floating_point()
        ]
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.stale = False

    def place(self, share: float) -> None:
        """Interpolate; what is to be recomputed waits for the weights."""
        with torch.no_grad():
            for mine, first, second in self.pairs:
                mine.copy_(torch.lerp(first, second.to(first), share))
        self.stale = self.batches is not None and bool(self.layers)

    def settle(self) -> None:
        """Compute the statistics anew at the present weights, once for each place."""
        if not self.stale:
            return
        assert self.batches is not None
        self.stale, seen, momenta = False, 0, [layer.momentum for layer in self.layers]
        try:
            for layer in self.layers:
                layer.reset_running_stats()
                layer.train()
            for batch in self.batches:
                seen += batch.size
                for layer in self.layers:
                    layer.momentum = batch.size / seen  # the mean over images, however they are cut
                self.model(batch.inputs)
        finally:
            for layer, momentum in zip(self.layers, momenta, strict=True):
                layer.momentum = momentum
                layer.eval()
