"""Finished runs and measurements of a figure, written by the store's own functions without any training.

Their logs, records and measurements have the size of real ones; only the checkpoints are small (`WEIGHTS`), since
nothing that lists or plans reads them. Their true size is that of the network's parameters.
"""

from collections.abc import Iterable

import numpy as np

from flatlab import environment, files
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.run import RunSpec
from flatlab.store.entry import Entry
from flatlab.store.runs import RunStore

WEIGHTS = {"weight": np.zeros(256, np.float32)}
UNIT = {"rises": np.zeros(900)}  # 7 kB, as the visits of 32 directions
RESULT = {"rises": np.zeros(3000)}  # 24 kB
SOURCES = ("art_painting", "cartoon", "photo")
FACTS = {"device": "cpu", "threads": 1, "passes": 1e6, "machine": environment.facts()}


def fill(
    store: RunStore, wanted: Iterable[tuple[RunSpec, list[MeasurementSpec]]], *, fingerprint: str = "f" * 64
) -> None:
    """Write runs with their measurements, unless they are there; the fingerprint is that of their data."""
    for spec, measurements in wanted:
        run = store.run(spec)
        if not run.done:
            with run.claim():
                run.write_log([_row(step) for step in range(0, spec.steps + 1, spec.eval_every)])
                for name in ("selected", "last"):
                    files.save_arrays(run.checkpoint(name), WEIGHTS)
                session = {"from_step": 0, "how": "begun", "to_step": spec.steps + 1, "seconds": 600.0}
                _finish(run, sessions=[session], data_fingerprint=fingerprint)
        for each in measurements:
            measurement = run.measurement(each)
            if not measurement.done:
                with measurement.claim():
                    files.save_arrays(measurement.unit("0-32"), UNIT)
                    files.save_arrays(measurement.result, RESULT)
                    _finish(measurement, seconds=10.0)


def _finish(entry: Entry, **facts: object) -> None:
    entry.note(**FACTS, **facts)
    entry.finish()


def _row(step: int) -> dict[str, object]:
    """Return a row of a log, as a training on photographs writes it."""
    score = {"accuracy": 0.9222222222222223, "loss": 0.19702279765276923, "n": 333}
    parts = {name: dict.fromkeys(SOURCES, score) for name in ("source", "test", "fitted")}
    target = dict.fromkeys(("in", "out"), score)
    numbers = {"train_loss": 0.5482766616344452, "validation": 0.9, "validation_loss": 0.2}
    return {"step": step, "looks": step, **parts, "target": target, **numbers}
