"""Flatness on spheres, sampled in resumable units."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from flatlab import files
from flatlab.arguments import FloatArray, JobReport
from flatlab.errors import UserError
from flatlab.landscape.codes import Neighbours
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network
from flatlab.measure.inputs import landscape, noise_norm
from flatlab.measure.units import UnitFiles
from flatlab.metrics.flatness import codes, planning
from flatlab.metrics.flatness.sampler import Draws, Sampler, counts
from flatlab.metrics.flatness.sphere import sample
from flatlab.quant.codes import code_neighbours
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.rises import ByNoise, ByRise
from flatlab.specs.run import Place
from flatlab.store.radii import by_rise
from flatlab.store.runs import Measurement, Run, RunStore


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure flatness at each radius; resumes an earlier call."""
    spec: SphereSpec = measurement.spec
    around, keep = landscape(run, spec, place), UnitFiles(measurement).units
    given = _radii(run, spec, place), spec.num_samples, (spec.rel_error, spec.abs_error), spec.budget
    if spec.space == "codes":
        if spec.normalisation != "none":
            raise UserError(
                f"Moves on the grid are not normalised, got normalisation={spec.normalisation!r}; leave it out."
            )
        grid = Neighbours.of(around, code_neighbours(network(run, spec.checkpoint, place)))
        moves = codes.CodeSampler([around], spec.seed, "none", keep=keep, grid=grid)
        tell = partial(_tell, report, moves) if report else None
        flatness = codes.sample(moves, *given, block_size=spec.block_size, report=tell)
    else:
        sampler = Sampler([around], spec.seed, spec.normalisation, keep=keep)
        tell = partial(_tell, report, sampler) if report else None
        (flatness,) = sample(sampler, *given, block_size=spec.block_size, report=tell)
    if "interrupted" in flatness.stopped:
        raise KeyboardInterrupt  # its units are stored: the next call resumes from them
    classes = len(loading_data.domains(run.spec, place).data.classes)
    rises = (0.0, *spec.radii.rises) if isinstance(spec.radii, ByRise) else ()
    found = replace(flatness, chance=float(np.log(classes)), rises=rises)
    files.save_arrays(measurement.result, *found.to_arrays())


def _radii(run: Run, spec: SphereSpec, place: Place) -> FloatArray | str:
    if isinstance(spec.radii, ByNoise):
        return np.array([0.0, *spec.radii.multiples]) * noise_norm(run, spec.checkpoint, place, spec.radii.bits)
    if isinstance(spec.radii, ByRise):
        return np.array([0.0, *by_rise(RunStore(run.path.parent), spec.radii, spec)])
    return spec.radii if isinstance(spec.radii, str) else np.array(spec.radii)


def foresee(measurement: Measurement, run: Run, place: Place) -> list[dict[str, Any]]:
    """Run the pilot, store its plan for the measurement, and return a row for each radius above zero.

    Args:
        measurement: with an accuracy target, its block size and pairs chosen by the pilot.
        run: a finished run.
        place: data folder, device, threads.
    """
    spec: SphereSpec = measurement.spec
    measurement.create()
    around = landscape(run, spec, place)
    sampler = Sampler([around], spec.seed, spec.normalisation, keep=UnitFiles(measurement).units)
    radii = planning.radii_of(sampler, _radii(run, spec, place))
    goal = planning.goal_of(around, int((radii > 0).sum()), None, (spec.rel_error, spec.abs_error), spec.budget)
    plans = planning.plans_of(sampler, radii, goal)
    return [
        {
            "run": run.spec.digest,
            "radius": plan.radius,
            "block_size": plan.block_size or around.num_samples,
            "pairs": plan.paired,
            "visits": plan.visits or None,  # None: determined while sampling
            "images": plan.visits * (plan.block_size or around.num_samples) * (2 if plan.paired else 1) or None,
        }
        for plan in plans
    ]


def _tell(report: JobReport, sampler: Sampler, per_radius: Sequence[Draws]) -> None:
    """Report the draws made and foreseen, and F at each radius with its current standard error."""
    made, foreseen = counts(per_radius)
    found = [sampler.estimate(draws) for draws in per_radius if draws.visits.shape[1] > 1]
    shown = [f"{e.value:.2g}±{e.stderr / abs(e.value):.0%}" for e in found if e.value and np.isfinite(e.stderr)]
    report(made, foreseen, {"F": " ".join(shown)})
