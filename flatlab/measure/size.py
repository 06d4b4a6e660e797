"""The size in bytes of a run's network as a file: that of its export, quantized or not."""

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.loading.checkpoint import network
from flatlab.loading.export import write
from flatlab.results.size import FileSize
from flatlab.specs.measurements import SizeSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Write the network to a temporary file, and store its size."""
    spec: SizeSpec = measurement.spec
    with files.scratch() as folder:
        written = write(network(run, spec.checkpoint, place).cpu(), run.spec, folder / "export", place)
    files.save_arrays(measurement.result, *FileSize(written.bytes, written.float_bytes).to_arrays())
