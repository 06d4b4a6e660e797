"""The radii at which the loss of a run rises by given amounts on its source domains, which other runs share."""

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.loading import data as loading_data
from flatlab.measure.inputs import landscape
from flatlab.measure.units import UnitFiles
from flatlab.metrics.flatness.pilot import radii_at_rises
from flatlab.specs.rises import ReachSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Determine the radii, unless an earlier call did."""
    del report  # seconds of work
    spec: ReachSpec = measurement.spec
    around = landscape(run, spec, place, of=loading_data.domains(run.spec, place).sources)
    keep = UnitFiles(measurement).units
    found = radii_at_rises(around, spec.rises, normalisation=spec.normalisation, seed=spec.seed, keep=keep)
    files.save_arrays(measurement.result, *found.to_arrays())
