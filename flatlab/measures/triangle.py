"""The trace of the Hessian in three ways, as numbers with intervals and a sentence."""

from collections.abc import Callable

import numpy as np

from flatlab import files
from flatlab.checkpoints import landscape
from flatlab.metrics.triangle import triangle
from flatlab.probespecs import TriangleSpec
from flatlab.runs import Probe, Run
from flatlab.shelf import Shelf
from flatlab.specs import Place

Report = Callable[[int, int, dict[str, float]], None]


def fill(probe: Probe, run: Run, place: Place, report: Report | None) -> None:
    """Measure what the probe asks for; its units, of spheres and of curvature, are kept."""
    spec: TriangleSpec = probe.spec
    found = triangle(landscape(run, spec, place), rel_error=spec.rel_error, seed=spec.seed, keep=Shelf(probe).units)
    corners = {name: [each.value, float(each.stderr), each.freedom] for name, each in found.corners.items()}
    facts = {"corners": corners, "agrees": found.agrees(), "quadratic_radius": found.quadratic_radius()}
    facts |= {"verdict": found.verdict(), "kinks": list(found.kinks), "norm": found.flatness.norm}
    facts |= {"hvps": found.cost.hvps, "images": found.cost.images}
    low, high = found.interval()
    arrays = {"radii": found.flatness.radii, "value": found.value, "low": low, "high": high}
    files.save_arrays(probe.result, {name: np.asarray(array) for name, array in arrays.items()}, facts)
