"""A worker: does the jobs of a plan, shared with other workers by locks that are released when their process ends.

`python -m flatlab.jobs.worker PLAN` writes one JSON event a line. With `--end-with-input` it ends, with code 1, when
its standard input is closed: a worker does not outlive the command that started it, even if that was killed. On
SIGTERM or SIGUSR2, which batch systems send, it saves the state of a training after the current step, and ends with
code 143.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flatlab import files
from flatlab.errors import UserError
from flatlab.jobs.plan import Event, Job, OnEvent, WorkPlan
from flatlab.specs.run import Place
from flatlab.store.runs import RunStore

IDLE_SECONDS = 0.1  # between the first two checks of jobs that others hold
EVENT_SECONDS = 0.2  # between two progress events of one job
STOPPED = 128 + signal.SIGTERM  # exit code, as that of a shell for SIGTERM
_training, _asked_to_stop = threading.Event(), threading.Event()


def work(jobs: Sequence[Job], store: RunStore, place: Place, *, emit: OnEvent, failures: Path | None = None) -> None:
    """Do all jobs that no other worker does, each once its needs are done; then help with others' measurements.

    Args:
        jobs: tried in this order, but for pilots and one measurement of each kind.
        store: receives the runs and measurements.
        place: data folder, device, threads.
        emit: called with events, each with the job's name: progress ("share", "shown"), "finished", or "error".
        failures: folder in which the workers of a plan note their errors, so that no job is tried again by another.
    """
    worker, pauses = _Worker(jobs, store, place, emit, failures), files.pauses(IDLE_SECONDS)
    while worker.pending:
        if _asked_to_stop.is_set():  # at the end of a training
            raise KeyboardInterrupt
        if worker.settles_one():
            pauses = files.pauses(IDLE_SECONDS)
        else:
            time.sleep(next(pauses))


class _Worker:
    """The pending jobs of a worker."""

    def __init__(
        self, jobs: Sequence[Job], store: RunStore, place: Place, emit: OnEvent, failures: Path | None
    ) -> None:
        self.pending = _in_order(jobs)
        self.coming = Counter(name for job in jobs for name in job.fills)  # what pending jobs finish
        self.store, self.place, self.emit, self.failures = store, place, emit, failures

    def settles_one(self) -> bool:
        """Do one job, or skip one that failed or whose needs failed; return False if none is free and ready."""
        # In order, since a job that was waiting may be ready now; if none is free, join a measurement.
        tries = ((job, join) for join in (False, True) for job in self.pending)
        settled = next((job for job, join in tries if self._settled(job, join=join)), None)
        if settled:
            self.pending.remove(settled)
            self.coming.subtract(settled.fills)
        return settled is not None

    def _settled(self, job: Job, *, join: bool) -> bool:
        if job.ready(self.store):
            return self._failed_before(job) or self._attempt(job, join=join)
        if all(self.coming[name] > 0 or self.store.finished(name) for name in job.needs):
            return False
        self.emit({"job": job.name, "error": "not tried: a run or measurement that it needs failed, or was removed."})
        return True

    def _attempt(self, job: Job, *, join: bool) -> bool:
        """Do a job if no other worker holds it, or join a measurement, whose units are locked one by one."""
        try:
            with ExitStack() as held:
                if not job.done(self.store):
                    if job.measurements:  # before the claim, which makes a folder
                        self.store.run(job.runs[0]).require_done()
                    free = held.enter_context(self.store.claim(job.claims(self.store)))
                    if not free and not (join and job.measurements):
                        return False
                    if self._failed_before(job):  # meanwhile, in another worker
                        return True
                    _do(job, self.store, self.place, self.emit)
            self.emit({"job": job.name, "finished": True})
        except Exception as error:
            self._fail(job, _event_of(error))
        return True

    def _note_of(self, job: Job) -> Path | None:
        return self.failures / f"failed-{job.digest}.json" if self.failures else None

    def _failed_before(self, job: Job) -> bool:
        """Whether the job failed in another worker; emits its error."""
        note = self._note_of(job)
        if note is None or not note.exists() or job.done(self.store):
            return False
        self.emit({"job": job.name, **files.read_json(note)})
        return True

    def _fail(self, job: Job, event: Event) -> None:
        if note := self._note_of(job):
            files.write_json(note, event)
        self.emit({"job": job.name, **event})


def _in_order(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs in the order in which they are tried: pilots and one measurement of each kind come first.

    Other measurements need the pilots. The cost of a pass depends on the kind, so that the time left can be estimated
    once one of each kind is done.
    """
    firsts = {job.kind: job for job in reversed(jobs) if job.measurements}
    return sorted(jobs, key=lambda job: job.kind[0] != "pilot" and firsts.get(job.kind) is not job)


def _event_of(error: Exception) -> Event:
    """Describe an error as an event: a sentence, and a traceback if it is a bug of flatlab."""
    if isinstance(error, UserError):
        return {"error": str(error)}
    if isinstance(error, OSError):
        return {"error": f"{error.strerror or error}: {error.filename or 'in the store'}; what is finished is kept."}
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return {"error": "out of memory; use a smaller --batch-size or --image-size, or fewer --workers."}
    trace = "".join(traceback.format_exception(error))
    return {"error": f"{type(error).__name__}: {error} (a bug in flatlab)", "trace": trace}


def _do(job: Job, store: RunStore, place: Place, emit: OnEvent) -> None:
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
    """Turns the reports of a training or a measurement into events, a few each second."""

    def __init__(self, name: str, emit: OnEvent, *, parts: int) -> None:
        self.name, self.emit, self.parts, self.part = name, emit, parts, 0
        self.reported = 0.0  # time of the last event

    def begin(self) -> None:
        """Report the beginning of the job, so that loading does not count as its time."""
        self.emit({"job": self.name, "share": 0.0})

    def __call__(self, made: int, of: int, shown: dict[str, Any]) -> None:
        """Report a part's progress, and numbers to show with it; a training can be stopped here."""
        if _asked_to_stop.is_set():
            raise KeyboardInterrupt
        if time.monotonic() - self.reported > EVENT_SECONDS:
            self.reported = time.monotonic()
            share = (self.part + made / of) / self.parts
            self.emit({"job": self.name, "share": share, "shown": shown})


def main() -> None:
    """Work through the plan named on the command line."""
    path = Path(sys.argv[1])
    plan = WorkPlan.parse(path.read_text())
    sys.stdout = sys.stderr  # keeps a library's output out of the events
    logging.getLogger("flatlab").addHandler(_Notes())
    if "--end-with-input" in sys.argv[2:]:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in ("SIGTERM", "SIGUSR2"):  # Slurm sends SIGUSR2 before the time limit
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    try:
        work(plan.jobs, RunStore(plan.store), plan.place, emit=_print, failures=path.parent)
    except KeyboardInterrupt:
        sys.exit(STOPPED if _asked_to_stop.is_set() else 128 + signal.SIGINT)


def _stop(*_: Any) -> None:
    """End after the current step of a training; else immediately, since files on disk are always complete."""
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
    os._exit(1)  # immediately: files on disk are always complete


def _print(event: Event) -> None:
    print(json.dumps(event), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
