"""Linear connectivity of two checkpoints: the height of the barrier on the line between them, with an interval.

The maximum along a path is biased upwards, since it selects noise. Therefore its place is chosen on one half of the
images, and the barrier is measured there on the other half.
"""

import copy
import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flatlab.arguments import FloatArray, Report, whole
from flatlab.errors import UserError, count_of
from flatlab.landscape.landscape import Landscape
from flatlab.results.connectivity import Connection, by_stratum, chord
from flatlab.results.estimate import Cost
from flatlab.seeds import base_seed, derive
from flatlab.tensors.batchnorm import Statistics
from flatlab.tensors.nested import Data

BLOCK = 128  # images that are evaluated together
FEWEST = 4  # images of a stratum: two in each half
DRAWS = 2000  # of the bootstrap


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

    Definition: Frankle et al. 2020, section 2, in nats; but only between the ends, so that it can be negative.

    Args:
        first: the landscape of one end.
        second: that of the other, of the same architecture over the same data.
        grid: places along the line, the ends included.
        recompute: training batches from which BatchNorm statistics are recomputed at each place (Izmailov et al. 2018).
            By default they are interpolated like the weights, so that both ends are the checkpoints.
        seed: of the halves and the bootstrap.
        report: called with the places done and foreseen.

    Raises:
        UserError: if the two differ in model, fixed parameters, data or loss, or there are too few places or images.
    """
    start, name = time.perf_counter(), base_seed(seed)
    _check(first, second, grid)
    path = first.around(copy.deepcopy(first.model))  # whose statistics may change
    moved, step = _Buffers(path.model, second.model, recompute), second.as_point(second.point) - first.point
    places = np.arange(grid) / (grid - 1)
    table, stratum = _losses(path, step, places, moved, report)
    chosen = np.isin(np.arange(len(stratum)), _half(stratum, name))
    with np.errstate(invalid="ignore"):  # values that are not finite stay so
        excess = table - chord(table, places)
    position = _highest(excess[:, chosen], stratum[chosen])
    kept, home = excess[position, ~chosen], stratum[~chosen]
    return Connection(
        places=places,
        length=float(torch.linalg.vector_norm(step, dtype=torch.float64)),
        losses=by_stratum(table, stratum),
        errors=_errors(excess, stratum),
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
            "A line between two checkpoints needs models of one architecture, but their parameters differ in shape"
            f" ({first.num_params:,} and {count_of(second.num_params, 'number')})."
        )
    if not first.shares_data(second):
        raise UserError("A line between two checkpoints needs the same data in the same order: pass the same.")
    if not first.shares_loss(second):
        raise UserError("A line between two checkpoints needs one loss function: pass the same to both landscapes.")
    if fixed := _differing(first, second):
        raise UserError(
            f"Parameters that do not vary differ between the checkpoints ({', '.join(fixed[:3])}), so that the line"
            " would not end at the second one: let them vary (params=, requires_grad_(True))."
        )
    whole("grid", grid, least=3)  # a barrier lies between the ends
    if first.sizes.min() < FEWEST:
        raise UserError(f"Each stratum must have at least {FEWEST} images, two in each half, got {first.sizes.min()}.")


def _differing(first: Landscape, second: Landscape) -> list[str]:
    """Return the names of the parameters that do not vary, and differ."""
    theirs = dict(second.model.named_parameters())
    fixed = {name: each for name, each in first.model.named_parameters() if name not in first.named}
    return [name for name, each in fixed.items() if name not in theirs or not torch.equal(each, theirs[name])]


def _losses(
    path: Landscape, step: Tensor, places: FloatArray, moved: "_Buffers", report: Report | None
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the loss (T, N) of each image at each place, and the images' strata (N,)."""
    blocks = list(path.blocks(BLOCK))
    once = np.sort(np.unique(np.concatenate([block.rows for block in blocks]), return_index=True)[1])
    singles = [block.by_sample() for block in blocks]
    scales = np.concatenate([[part.scale for part in single.parts] for single in singles])
    table = []
    with path.moving(settle=moved.settle) as at, np.errstate(invalid="ignore"):
        for done, place in enumerate(places.tolist(), start=1):
            moved.place(place)
            table.append(np.concatenate([at(step, place, block=path.gather(single)) for single in singles]) / scales)
            if report:
                report(done, len(places))
    return np.stack(table)[:, once], np.concatenate([block.strata for block in blocks])[once]


def _errors(excess: FloatArray, stratum: npt.NDArray[np.int64]) -> FloatArray:
    """Return the standard error (T,) of the mean over strata, which weigh equally."""
    with np.errstate(invalid="ignore"):
        parts = [excess[:, stratum == s] for s in range(stratum.max() + 1)]
        return np.asarray(np.sqrt(sum(part.var(axis=1, ddof=1) / part.shape[1] for part in parts)) / len(parts))


def _half(stratum: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Return half of the images of each stratum."""
    rng = np.random.default_rng(derive("connectivity", "halves", seed))
    halves = []
    for s in range(stratum.max() + 1):
        mine = rng.permutation(np.flatnonzero(stratum == s))
        halves.append(mine[: len(mine) // 2])
    return np.concatenate(halves)


def _highest(excess: FloatArray, stratum: npt.NDArray[np.int64]) -> int:
    """Return the index between the ends at which the mean over strata is largest, or NaN."""
    means = by_stratum(excess, stratum).mean(axis=1)
    return 1 + int(np.argmax(np.nan_to_num(means[1:-1], nan=np.inf)))


def _bootstrap(excess: FloatArray, stratum: npt.NDArray[np.int64], seed: int) -> FloatArray:
    rng = np.random.default_rng(derive("connectivity", "bootstrap", seed))
    means = []
    with np.errstate(invalid="ignore"):
        for s in range(stratum.max() + 1):
            mine = excess[stratum == s]
            means.append([mine[rng.integers(len(mine), size=len(mine))].mean() for _ in range(DRAWS)])
        return np.asarray(np.mean(means, axis=0))


class _Buffers:
    """Moves a model's floating-point buffers along with its weights; recomputes those of BatchNorm on request.

    Args:
        model: a private copy of the first.
        other: the second model.
        recompute: batches to compute BatchNorm's statistics from, instead of interpolating them.
    """

    def __init__(self, model: nn.Module, other: nn.Module, recompute: Data | None) -> None:
        theirs = dict(other.named_buffers())
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = [
            (mine, mine.clone(), theirs[name]) for name, mine in model.named_buffers() if mine.is_floating_point()
        ]
        self.statistics, self.stale = Statistics(model, recompute), False

    def place(self, share: float) -> None:
        """Interpolate; statistics are recomputed in `settle`, once the weights are set."""
        with torch.no_grad():
            for mine, first, second in self.pairs:
                mine.copy_(torch.lerp(first, second.to(first), share))
        self.stale = True

    def settle(self) -> None:
        """Compute the statistics at the current weights, once for each place."""
        if self.stale:
            self.stale = False
            self.statistics.renew()
