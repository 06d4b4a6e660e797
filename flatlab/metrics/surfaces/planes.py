"""Lines and planes through a landscape: each place is computed from the point itself and evaluated once.

Places are grouped in tiles, each a unit that can be stored as a file (`keep`), so that a surface can be resumed.
A plane can be refined from coarse to fine: evaluated where linear interpolation would be wrong.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.arguments import FloatArray, Report, whole
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.surfaces.directions import Directions, checked, random_directions
from flatlab.metrics.surfaces.refinement import refined
from flatlab.metrics.units import Keep, forget
from flatlab.results.estimate import Cost
from flatlab.results.surface import Profile, Surface
from flatlab.seeds import base_seed, derive
from flatlab.tensors.batchnorm import Statistics
from flatlab.tensors.losses import Metric
from flatlab.tensors.nested import Data

TILE = 32  # places of a unit
MARGIN = 0.3  # of the marks' spread, around them


def correct(outputs: Any, targets: Any) -> Tensor:
    """Return 1 for each sample whose class scores highest, else 0: a metric whose mean is the accuracy."""
    hits: Tensor = outputs.argmax(1) == targets
    return hits.to(torch.float32)


def line(
    landscape: Landscape,
    directions: Directions | None = None,
    *,
    grid: int | npt.ArrayLike = 51,
    metrics: Mapping[str, Metric] | None = None,
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
    report: Report | None = None,
) -> Profile:
    """Evaluate a landscape along lines through its point: w + t d for each direction d and place t.

    Args:
        landscape: with one stratum for each domain or split that is to be shown.
        directions: by default five random filter-normalised ones, whose spread is the profile's band.
        grid: places t, or their number between -1 and 1.
        metrics: functions of the loss's form by name; loss and, for classes, accuracy by default.
        seed: of the random directions.
        keep: stores tiles.
        report: called with the places done and foreseen.

    Raises:
        UserError: if a grid has fewer than two places, or directions are of another model.
    """
    start, name = time.perf_counter(), base_seed(seed)
    found = directions or random_directions(landscape, count=5, seed=name)
    places = _axis(grid, (-1.0, 1.0))
    evaluator = _Evaluator(landscape, found.vectors, _metrics(landscape, metrics), keep, report)
    count = len(found.vectors)
    steps = np.zeros((count, len(places), count))
    steps[np.arange(count), :, np.arange(count)] = places
    values = evaluator.evaluate(steps.reshape(-1, count))
    return Profile(
        places=places,
        values=values.reshape(count, len(places), *values.shape[1:]),
        strata=landscape.strata,
        metrics=tuple(evaluator.metrics),
        labels=found.labels,
        seed=name,
        cost=evaluator.cost(start),
    )


def plane(
    landscape: Landscape,
    directions: Directions | None = None,
    *,
    grid: int | tuple[npt.ArrayLike, npt.ArrayLike] = 51,
    metrics: Mapping[str, Metric] | None = None,
    refine: float | None = None,
    recompute: Data | None = None,
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
    report: Report | None = None,
) -> Surface:
    """Evaluate a landscape on a plane through its point: w + a u + b v, all strata and metrics in one pass a place.

    Args:
        landscape: with one stratum for each domain or split that is to be shown side by side.
        directions: the first two span the plane; by default random filter-normalised ones (Li et al. 2018).
        grid: places a and b, or their number along each axis: between -1 and 1, or around the directions' marks. With
            an odd number, w itself is the middle one.
        metrics: functions of the loss's form by name; by default loss and, for classes, accuracy.
        refine: begin with a coarse grid, and halve the cells in which linear interpolation is off by more than this
            share of the loss's height above its minimum (plus 2 % of its range); 0.05 saves half to nine tenths. The
            number of cells along an axis should be a multiple of 8, or of 16: 49 or 65 places.
        recompute: batches from which BatchNorm statistics are recomputed at each place; by default the model's own.
        seed: of the random directions.
        keep: stores tiles.
        report: called with the places done and foreseen.

    Raises:
        UserError: if a grid has fewer than two places, or directions are fewer than two or of another model.
    """
    start, name = time.perf_counter(), base_seed(seed)
    found = directions or random_directions(landscape, seed=name)
    if len(found.vectors) < 2:
        raise UserError("A plane needs two directions, got one: use `line` for one direction.")
    x, y = _axes(grid, found.marks)
    evaluator = _Evaluator(landscape, found.vectors[:2], _metrics(landscape, metrics), keep, report, recompute)
    values, measured = refined(evaluator.evaluate, x, y, _tolerance(refine))
    return Surface(
        x=x,
        y=y,
        values=values,
        measured=measured,
        strata=landscape.strata,
        metrics=tuple(evaluator.metrics),
        seed=name,
        cost=evaluator.cost(start),
        statistics="own" if recompute is None else "recomputed",
        **_described(found),
    )


def _described(found: Directions) -> dict[str, Any]:
    """Return the fields of a surface that describe its plane."""
    return {
        "labels": found.labels[:2],
        "marks": found.marks[:, :2],
        "mark_labels": found.mark_labels,
        "distances": found.distances,
        "explained": found.explained[:2],
        "connected": found.connected,
        "cosine": found.cosine,
    }


def _tolerance(refine: float | None) -> float | None:
    if refine is not None and not refine > 0:
        raise UserError(f"refine must be a positive share, such as 0.05, or None for the whole grid, got {refine}.")
    return refine


def _metrics(landscape: Landscape, metrics: Mapping[str, Metric] | None) -> dict[str, Metric]:
    if metrics is not None:
        if not metrics:
            raise UserError("metrics must have at least one entry, got none: pass {name: function}, or None.")
        return dict(metrics)
    named: dict[str, Metric] = {"loss": landscape.loss}
    return named if landscape.evaluate().accuracy is None else {**named, "accuracy": correct}


def _axis(grid: int | npt.ArrayLike, ends: tuple[float, float]) -> FloatArray:
    """Return places: those given, or a number of them between two ends; the middle one of an odd number is exact."""
    if np.ndim(grid) == 0:
        count, (low, high) = whole("grid", grid, least=2), ends
        return np.asarray(low + (high - low) * np.arange(count) / (count - 1))
    places = np.asarray(grid)
    places = places.astype(np.float64) if places.dtype.kind in "iuf" else np.zeros(0)
    if places.ndim != 1 or len(places) < 2 or not np.isfinite(places).all() or len(np.unique(places)) < len(places):
        raise UserError(
            f"grid must have at least two places along each axis, finite and distinct, got {grid!r}: write 51, or"
            " np.linspace(-1, 1, 51)."
        )
    return places


def _axes(grid: int | tuple[npt.ArrayLike, npt.ArrayLike], marks: FloatArray) -> tuple[FloatArray, FloatArray]:
    if isinstance(grid, tuple | list | np.ndarray):
        if len(grid) != 2:
            raise UserError(f"The grid of a plane must be a number, or two arrays of places, got {len(grid)}.")
        x, y = grid
        return _axis(x, (-1.0, 1.0)), _axis(y, (-1.0, 1.0))
    if not len(marks):
        return _axis(grid, (-1.0, 1.0)), _axis(grid, (-1.0, 1.0))
    inner = np.vstack([marks[:, :2], np.zeros(2)])
    low, high = inner.min(axis=0), inner.max(axis=0)
    room = MARGIN * np.maximum(high - low, 0.1 * (high - low).max())
    x, y = (_axis(grid, (float(a), float(b))) for a, b in zip(low - room, high + room, strict=True))
    return x, y


@dataclass
class _Evaluator:
    """Evaluates places, in tiles that are stored.

    Args:
        landscape: around w.
        vectors: (D, P) directions.
        metrics: what is evaluated.
        keep: stores tiles.
        report: called with places done and foreseen.
        recompute: batches for BatchNorm's statistics at each place.
    """

    landscape: Landscape
    vectors: Tensor
    metrics: dict[str, Metric]
    keep: Keep
    report: Report | None
    recompute: Data | None = None
    evaluated: int = 0
    foreseen: int = 0

    def __post_init__(self) -> None:
        self.vectors = torch.stack([checked(self.landscape, vector) for vector in self.vectors])
        Statistics(self.landscape.model, self.recompute)  # refuses before anything is forwarded

    def evaluate(self, places: FloatArray) -> FloatArray:
        """Return the metrics (N, S, M) at places (N, D)."""
        tiles = [places[k : k + TILE] for k in range(0, len(places), TILE)]
        units = [(f"tile-{derive(tile.tolist()):016x}", partial(self.tile, tile)) for tile in tiles]
        self.foreseen = max(self.foreseen, self.evaluated + len(places))
        found = [np.zeros((0, len(self.landscape.strata), len(self.metrics)))]
        for tile, values in zip(tiles, self.keep(units), strict=True):
            found.append(values)
            self.evaluated += len(tile)
            if self.report:
                self.report(self.evaluated, self.foreseen)
        return np.concatenate(found)

    def tile(self, places: FloatArray) -> FloatArray:
        """Evaluate a tile; each place is computed from the point itself, without allocating memory."""
        step, path = torch.empty_like(self.vectors[0]), self.landscape
        if self.recompute is not None:
            path = path.around(copy.deepcopy(path.model), check=False)  # a private copy, whose statistics may change
        settle = Statistics(path.model, self.recompute).renew
        with path.moving(*self.metrics.values(), settle=settle) as at, torch.no_grad():
            return np.stack([at(displacement(self.vectors, each, out=step)) for each in places.tolist()])

    def cost(self, start: float) -> Cost:
        """Return the cost so far."""
        images = self.evaluated * self.landscape.num_samples
        return Cost(float(self.evaluated), images, 0, time.perf_counter() - start)


def displacement(vectors: Tensor, place: Sequence[float], *, out: Tensor) -> Tensor:
    """Write the sum of the directions (D, P) times coordinates (D,) to a vector (P,), and return it."""
    torch.mul(vectors[0], place[0], out=out)
    for vector, coordinate in zip(vectors[1:], place[1:], strict=True):
        out.add_(vector, alpha=coordinate)
    return out
