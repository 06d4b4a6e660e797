"""A plane through a checkpoint: its tiles are units of the probe."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from flatlab import files
from flatlab.checkpoints import landscape, network, other_of, training_images
from flatlab.landscape import Landscape
from flatlab.metrics.directions import (
    Directions,
    eigen_directions,
    plane_through,
    random_directions,
    trajectory_directions,
)
from flatlab.metrics.grids import parts
from flatlab.metrics.keeping import KeptHessian
from flatlab.metrics.lanczos import hessian_spectrum
from flatlab.metrics.surfaces import plane
from flatlab.params import flatten
from flatlab.probespecs import SurfaceSpec
from flatlab.quant.attach import bake
from flatlab.runs import Probe, Run
from flatlab.shelf import Shelf
from flatlab.specs import Place

Report = Callable[[int, int, dict[str, float]], None]


def fill(probe: Probe, run: Run, place: Place, report: Report | None) -> None:
    """Measure what the probe asks for, from where an earlier call was stopped."""
    spec: SurfaceSpec = probe.spec
    around = landscape(run, spec, place)
    places = spec.extent * (2 * np.arange(spec.grid) / (spec.grid - 1) - 1)
    surface = plane(
        around,
        directions(around, probe, run, place),
        grid=spec.grid if spec.spanned else (places, places),
        refine=spec.refine,
        recompute=training_images(run, spec.recompute, place),
        seed=spec.seed,
        keep=Shelf(probe).units,
        report=None if report is None else lambda done, of: report(done, of, {}),
    )
    arrays, facts = parts(surface)
    facts["cost"]["seconds"] = 0.0  # in the provenance: results of equal specs are equal bytes
    files.save_arrays(probe.result, arrays, facts)


def directions(around: Landscape, probe: Probe, run: Run, place: Place) -> Directions:
    """Return what spans the plane: other checkpoints of the store stand beside this run's."""
    spec: SurfaceSpec = probe.spec
    if spec.axes == "random":
        return random_directions(around, seed=spec.seed)
    if spec.axes == "hessian":
        operator = KeptHessian(around, Shelf(probe).units).operator()
        found = hessian_spectrum(operator, k=2, seed=spec.seed, vectors=True)
        return eigen_directions(around, spectrum=found)
    if spec.axes == "trajectory":
        return _trajectory(around, spec, run, place)
    others = [other_of(run, digest, place) for digest in spec.through]
    points = [point_of(around, other, spec, place) for other in others]
    names = [other.name for other in others]
    if len(points) == 2:
        return plane_through(around, *points, names=[run.name, *names])
    return trajectory_directions(around, points, names=names)


def _trajectory(around: Landscape, spec: SurfaceSpec, run: Run, place: Place) -> Directions:
    """Return the principal directions of the checkpoints that the run's training kept."""
    steps, kept = run.spec.iterates(run.kept_each(spec.every)), run.kept()
    points = [point_of(around, run.lineage, spec, place, checkpoint=kept[step]) for step in steps]
    return trajectory_directions(around, points, names=[f"step {step}" for step in steps])


def point_of(
    around: Landscape, run: Run, spec: SurfaceSpec, place: Place, *, checkpoint: str | Path | None = None
) -> Tensor:
    """Return a run's weights (P,) as a point of a landscape, at the spec's checkpoint or at a kept one."""
    loaded = network(run, checkpoint or spec.checkpoint, place)
    if spec.space == "baked":
        bake(loaded)
    named = dict(loaded.named_parameters())
    return flatten([named[name] for name in around.named if name in named])
