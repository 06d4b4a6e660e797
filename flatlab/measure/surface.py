"""A plane through a checkpoint: its tiles are units of the measurement."""

from pathlib import Path

import numpy as np
from torch import Tensor

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.landscape.landscape import Landscape
from flatlab.loading.checkpoint import network
from flatlab.measure.inputs import landscape, other_of, training_images
from flatlab.measure.units import UnitFiles
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.resumable import KeptHessian
from flatlab.metrics.surfaces.directions import (
    Directions,
    eigen_directions,
    plane_through,
    random_directions,
    trajectory_directions,
)
from flatlab.metrics.surfaces.planes import plane
from flatlab.quant.attach import bake
from flatlab.specs.measurements import SurfaceSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run
from flatlab.tensors.flat import flatten


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure the plane; resumes an earlier call."""
    spec: SurfaceSpec = measurement.spec
    around = landscape(run, spec, place)
    places = spec.extent * (2 * np.arange(spec.grid) / (spec.grid - 1) - 1)
    surface = plane(
        around,
        directions(around, measurement, run, place),
        grid=spec.grid if spec.spanned else (places, places),
        refine=spec.refine,
        recompute=training_images(run, spec.recompute, place),
        seed=spec.seed,
        keep=UnitFiles(measurement).units,
        report=None if report is None else lambda done, of: report(done, of, {}),
    )
    files.save_arrays(measurement.result, *surface.to_arrays())


def directions(around: Landscape, measurement: Measurement, run: Run, place: Place) -> Directions:
    """Return the directions that span the plane, which may be those to other checkpoints of the store."""
    spec: SurfaceSpec = measurement.spec
    if spec.axes == "random":
        return random_directions(around, seed=spec.seed)
    if spec.axes == "hessian":
        operator = KeptHessian(around, UnitFiles(measurement).units).operator()
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
