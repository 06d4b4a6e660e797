"""The straight line to another run's checkpoint, over the source domains and over the held-out one."""

from functools import partial

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.loading import data as loading_data
from flatlab.measure.inputs import landscape, other_of, training_images
from flatlab.metrics.surfaces.connectivity import connect
from flatlab.results.connectivity import Connections
from flatlab.specs.measurements import ConnectionSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure the line over the domains of each panel."""
    spec: ConnectionSpec = measurement.spec
    other, data = other_of(run, spec.to, place), loading_data.domains(run.spec, place)
    recompute = training_images(run, spec.recompute, place)
    panels = {"source": data.sources, "target": (data.target,)}
    found = {}
    for index, (panel, names) in enumerate(panels.items()):
        ends = [landscape(each, spec, place, of=names) for each in (run, other)]
        tell = None if report is None else partial(_tell, report, index)
        found[panel] = connect(*ends, grid=spec.grid, recompute=recompute, seed=spec.seed, report=tell)
    files.save_arrays(measurement.result, *Connections(found).to_arrays())


def _tell(report: JobReport, panel: int, done: int, of: int) -> None:
    report(panel * of + done, 2 * of, {})
