"""A worker: does the jobs of a plan, sharing them with whoever else does, by locks that die with their process.

`python -m flatlab.jobs.worker PLAN` writes one JSON event a line. With `--end-with-input` it ends, with code 1, when
its standard input is closed: a worker does not outlive the command that started it, even where that was killed. On
SIGTERM, which batch systems send, it saves the state of a training after the step that it is at, and ends with code
143.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flatlab.errors import UserError
from flatlab.jobs.plan import Job, WorkPlan
from flatlab.specs.run import Place
from flatlab.store.runs import RunStore

Event = dict[str, Any]
Emit = Callable[[Event], None]
IDLE_SECONDS = 0.1  # between two looks at jobs that others hold
EVENT_SECONDS = 0.2  # between two progress events of one job
STOPPED = 128 + signal.SIGTERM  # exit code, as a shell gives for SIGTERM
_training, _asked_to_stop = threading.Event(), threading.Event()


def work(jobs: Sequence[Job], store: RunStore, place: Place, *, emit: Emit) -> None:
    """Do all jobs that nobody else does, each as soon as what it needs is done; then help others to measure.

    Args:
        jobs: in the order in which they are tried.
        store: receives the runs and measurements.
        place: data folder, device, threads.
        emit: called with events, each with the job's name: progress ("share", "shown"), "finished", or "error".
    """
    pending = list(jobs)
    while pending:
        if _asked_to_stop.is_set():  # while a training ended
            raise KeyboardInterrupt
        # The first jobs first: what was waiting may be ready now. Who finds none free joins a measurement.
        tries = ((job, join) for join in (False, True) for job in pending)
        settled = next((job for job, join in tries if _settled(job, pending, store, place, emit, join=join)), None)
        if settled:
            pending.remove(settled)
        else:
            time.sleep(IDLE_SECONDS)


def _settled(
    job: Job, pending: Sequence[Job], store: RunStore, place: Place, emit: Emit, *, join: bool = False
) -> bool:
    """Do a job, or give it up; False where others hold it, or what it needs is still to come."""
    if job.ready(store):
        return _attempt(job, store, place, emit, join=join)
    coming = {name for other in pending for name in other.fills}
    if coming >= {name for name in job.needs if not store.finished(name)}:
        return False
    emit({"job": job.name, "error": "not tried: what it needs failed, or was removed."})
    return True


def _attempt(job: Job, store: RunStore, place: Place, emit: Emit, *, join: bool = False) -> bool:
    """Do a job if nobody holds it, or join who holds a measurement, whose units are locked one by one."""
    try:
        with ExitStack() as held:
            if not job.done(store):
                if job.measurements:  # before anything is claimed: a claim makes a folder
                    store.run(job.runs[0]).require_done()
                if not held.enter_context(store.claim(job.claims(store))) and not (join and job.measurements):
                    return False
                _do(job, store, place, emit)
        emit({"job": job.name, "finished": True})
    except Exception as error:
        emit({"job": job.name, **_event_of(error)})
    return True


def _event_of(error: Exception) -> Event:
    """Describe an error as an event: a sentence, and a traceback if it is a bug of flatlab."""
    if isinstance(error, UserError):
        return {"error": str(error)}
    if isinstance(error, OSError):
        return {"error": f"{error.strerror or error}: {error.filename or 'in the store'}; what is finished is kept."}
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return {"error": "out of memory; take a smaller --batch-size or --image-size, or fewer --workers."}
    trace = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error} (a bug in flatlab)", "trace": trace}


def _do(job: Job, store: RunStore, place: Place, emit: Emit) -> None:
    report = _Reporter(job.name, emit, parts=max(1, len(job.measurements)))
    if job.measurements:
        from flatlab.measure.runner import measure

        report.begin()
        for measurement in job.measurements:
            measure(store.run(job.runs[0]), measurement, place, report=report)
            report.part += 1
    elif job.runs[0].members:
        from flatlab.train.derived import join

        report.begin()
        join(job.runs[0], store, place)
    else:
        from flatlab.train.loop import train

        report.begin()
        _training.set()
        try:
            train(job.runs, store, place, forks=job.forks, keep_every=job.keep_every, report=report)
        finally:
            _training.clear()
        store.run(job.runs[0]).note(passes=job.passes)


class _Reporter:
    """Turns what a training or a measurement reports into events, a few each second."""

    def __init__(self, name: str, emit: Emit, *, parts: int) -> None:
        self.name, self.emit, self.parts, self.part = name, emit, parts, 0
        self.reported = 0.0  # time of the last event

    def begin(self) -> None:
        """Report that the job begins: what was loaded until now is no part of its seconds."""
        self.emit({"job": self.name, "share": 0.0})

    def __call__(self, made: int, of: int, shown: dict[str, Any]) -> None:
        """Report a part's progress, and numbers to show beside it; a training can be stopped here."""
        if _asked_to_stop.is_set():
            raise KeyboardInterrupt
        if time.monotonic() - self.reported > EVENT_SECONDS:
            self.reported = time.monotonic()
            share = (self.part + made / of) / self.parts
            self.emit({"job": self.name, "share": share, "shown": shown})


def main() -> None:
    """Work through the plan named on the command line."""
    plan = WorkPlan.parse(Path(sys.argv[1]).read_text())
    sys.stdout = sys.stderr  # what a library prints must not come between the events
    logging.getLogger("flatlab").addHandler(_Notes())
    if "--end-with-input" in sys.argv[2:]:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _stop)
    try:
        work(plan.jobs, RunStore(plan.store), plan.place, emit=_print)
    except KeyboardInterrupt:
        sys.exit(STOPPED if _asked_to_stop.is_set() else 128 + signal.SIGINT)


def _stop(*_: Any) -> None:
    """End after the step that a training is at; else at once: what is on disk is whole at any instant."""
    if not _training.is_set():
        os._exit(STOPPED)
    _asked_to_stop.set()


class _Notes(logging.Handler):
    """Passes flatlab's warnings on as events."""

    def emit(self, record: logging.LogRecord) -> None:
        _print({"job": "worker", "note": record.getMessage()})


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held at the interpreter's end
        pass
    os._exit(1)  # at once: what is on disk is whole at any instant


def _print(event: Event) -> None:
    print(json.dumps(event), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
