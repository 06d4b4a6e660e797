"""Measurements of runs, stored on disk; other modules of this package measure each metric."""

from collections.abc import Callable
from importlib import import_module

from flatlab import environment
from flatlab.arguments import JobReport
from flatlab.loading import data as loading_data
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run, check_data

FUNCTIONS = {
    "sphere": "sphere.fill",
    "reach": "reach.fill",
    "spectrum": "spectrum.fill",
    "surface": "surface.fill",
    "connectivity": "connectivity.fill",
    "trace_check": "diagnostics.fill_trace_check",
    "scale_audit": "diagnostics.fill_scale_audit",
    "gradcam": "gradcam.fill",
    "quantization_noise": "quantization_noise.fill",
    "rounding": "rounding.fill",
    "size": "size.fill",
    "latency": "size.fill_latency",
    "generalisation": "generalisation.fill",
}


def function_of(metric: str) -> Callable[[Measurement, Run, Place, JobReport | None], None]:
    """Return the function that measures a metric; its module is imported here, so that a worker loads what it needs.

    Args:
        metric: metric of a spec, such as "sphere".
    """
    module, _, name = FUNCTIONS[metric].partition(".")
    function: Callable[[Measurement, Run, Place, JobReport | None], None]
    function = getattr(import_module(f"flatlab.measure.{module}"), name)
    return function


def measure(run: Run, spec: MeasurementSpec, place: Place, *, report: JobReport | None = None) -> None:
    """Measure a finished run; resumes an earlier call.

    Args:
        run: a finished run.
        spec: the measurement.
        place: data folder, device, threads.
        report: called with the work done and foreseen, and numbers to show.

    Raises:
        UserError: if the run is not finished, its data differ, or a file is damaged.
    """
    measurement = run.measurement(spec)
    check_data([run], place)
    if measurement.done:
        return
    run.require_done()
    place = place.replace(threads=measurement.provenance.get("threads", place.threads))  # they change rounding
    with loading_data.computing(place.threads):
        measurement.create()
        measurement.note(machine=environment.facts(), **place.model_dump())
        function_of(spec.metric)(measurement, run, place, report)
        measurement.finish()
