"""The scale audit and the trace check of a run, as measurements."""

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.measure.inputs import landscape
from flatlab.measure.units import UnitFiles
from flatlab.metrics.scale_audit import scale_audit
from flatlab.metrics.trace_check import trace_check
from flatlab.specs.measurements import ScaleAuditSpec, TraceCheckSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run


def fill_scale_audit(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure the scale audit; units of spheres and of curvature are stored."""
    spec: ScaleAuditSpec = measurement.spec
    keep = UnitFiles(measurement).units
    found = scale_audit(
        landscape(run, spec, place), most=spec.most, num_samples=spec.num_samples, seed=spec.seed, keep=keep
    )
    files.save_arrays(measurement.result, *found.to_arrays())


def fill_trace_check(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure the trace check; units of spheres and of curvature are stored."""
    spec: TraceCheckSpec = measurement.spec
    found = trace_check(
        landscape(run, spec, place), rel_error=spec.rel_error, seed=spec.seed, keep=UnitFiles(measurement).units
    )
    files.save_arrays(measurement.result, *found.to_arrays())
