"""A plane through a checkpoint: its tiles are units of the probe."""

from collections.abc import Callable

import numpy as np

from flatlab import build, files
from flatlab.checkpoints import landscape, network
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
from flatlab.runs import Probe, Run, RunStore
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
        grid=spec.grid if spec.axes == "runs" else (places, places),
        refine=spec.refine,
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
    store = RunStore(run.path.parent)
    others = [store.find(digest) for digest in spec.through]
    points, fingerprint = [], build.domains(run.spec, place).data.fingerprint
    for other in others:
        other.check_data(fingerprint)
        loaded = network(other, spec.checkpoint, place)
        if spec.space == "baked":
            bake(loaded)
        named = dict(loaded.named_parameters())
        points.append(flatten([named[name] for name in around.named if name in named]))
    names = [other.name for other in others]
    if len(points) == 2:
        return plane_through(around, *points, names=[run.name, *names])
    return trajectory_directions(around, points, names=names)
