"""From a run to a measurement on disk, whatever its kind; `flatlab/measures/` has a module for each metric."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from flatlab import build, machine
from flatlab.probespecs import Probing
from flatlab.runs import Run, check_data
from flatlab.specs import Place

Report = Callable[[int, int, dict[str, Any]], None]


def measure(run: Run, spec: Probing, place: Place, *, report: Report | None = None) -> None:
    """Measure a finished run, from where an earlier call was stopped.

    Args:
        run: the run, done.
        spec: what to measure.
        place: data folder, device, threads.
        report: called with what is done, what is foreseen, and numbers to show.

    Raises:
        UserError: where the run is not finished, its data differ, or a file is damaged.
    """
    probe = run.probe(spec)
    check_data([run], place)
    if probe.done:
        return
    run.require_done()
    place = place.replace(threads=probe.provenance.get("threads", place.threads))  # they order the sums
    with build.threads(place.threads):
        probe.create()
        probe.note(machine=machine.facts(), **place.model_dump())
        import_module(f"flatlab.measures.{spec.metric}").fill(probe, run, place, report)
        probe.finish()
