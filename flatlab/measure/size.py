"""The size of a run's network as a file, and its latency on this processor."""

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.deploy import session
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network
from flatlab.loading.export import write
from flatlab.results.size import FileSize
from flatlab.specs.measurements import LatencySpec, SizeSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Write the network to a temporary file, and store its size."""
    spec: SizeSpec = measurement.spec
    with files.scratch() as folder:
        written = write(network(run, spec.checkpoint, place).cpu(), run.spec, folder / "export", place)
    files.save_arrays(measurement.result, *FileSize(written.bytes, written.float_bytes).to_arrays())


def fill_latency(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Time the run's network in each engine, and evaluate it on the held-out domain."""
    session.needed()
    from flatlab.deploy import engines, latency, onnx  # need the extra `deploy`

    spec: LatencySpec = measurement.spec
    batches = onnx.evaluated(loading_data.domains(run.spec, place))["target"]
    with engines.engines([run], [], place) as ready:
        accuracies = [each.accuracy(batches) for each in ready]
        found = latency.timed(ready, rounds=spec.rounds, accuracies=accuracies)
    files.save_arrays(measurement.result, *found.to_arrays())
