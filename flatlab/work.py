"""A worker: does the jobs of a plan, sharing them with whoever else does, by locks that die with their process.

`python -m flatlab.work PLAN` writes one JSON event a line, and ends when its standard input is closed: a worker does
not outlive the command that started it, even where that was killed.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flatlab.errors import UserError
from flatlab.jobs import Job, Plan
from flatlab.runs import RunStore
from flatlab.specs import Place

Event = dict[str, Any]
Emit = Callable[[Event], None]
IDLE_SECONDS = 0.1  # between two looks at jobs that others hold
EVENT_SECONDS = 0.2  # between two progress events of one job


def work(jobs: Sequence[Job], store: RunStore, place: Place, *, emit: Emit) -> None:
    """Do all jobs that nobody else does, each as soon as what it needs is done.

    Args:
        jobs: in the order in which they are tried.
        store: receives the runs and probes.
        place: data folder, device, threads.
        emit: called with events, each with the job's name: progress ("made", "of"), "finished", or "error".
    """
    pending, failed = list(jobs), set[str]()
    while pending:
        busy = True
        for job in list(pending):
            if failed & set(job.needs):
                emit({"job": job.name, "error": "not tried: what it needs failed."})
            elif not job.ready(store) or not _attempt(job, store, place, emit):
                continue  # others hold it, or what it needs
            elif not job.done(store):
                failed.update(spec.digest for spec in job.runs)
            pending.remove(job)
            busy = False
            break  # the first jobs first: what was waiting may be ready now
        if busy:
            time.sleep(IDLE_SECONDS)


def _attempt(job: Job, store: RunStore, place: Place, emit: Emit) -> bool:
    """Do a job if nobody holds it; returns whether that was so."""
    if not job.done(store):
        with store.claim(job.entries(store)) as free:
            if not free:
                return False
            if not job.done(store) and (error := _told(lambda: _do(job, store, place, emit))):
                emit({"job": job.name, **error})
                return True
    emit({"job": job.name, "finished": True})
    return True


def _told(act: Callable[[], None]) -> Event | None:
    """Act; return what went wrong as an event: a sentence, and a trace where it is our fault."""
    try:
        act()
    except UserError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"{error.strerror}: {error.filename or 'in the store'}; what is finished is kept."}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error} (a bug in flatlab)", "trace": traceback.format_exc()}
    return None


def _do(job: Job, store: RunStore, place: Place, emit: Emit) -> None:
    report = _Reporter(job.name, emit, parts=max(1, len(job.probes)))
    if job.probes:
        from flatlab.measure import measure

        for probe in job.probes:
            measure(store.run(job.runs[0]), probe, place, report=report)
            report.part += 1
    else:
        from flatlab.train.loop import train

        train(job.runs, store, place, forks=job.forks, report=report)
        store.run(job.runs[0]).note(passes=job.passes)


class _Reporter:
    """Turns what a training or a measurement reports into events, a few each second."""

    def __init__(self, name: str, emit: Emit, *, parts: int) -> None:
        self.name, self.emit, self.parts, self.part = name, emit, parts, 0
        self.told = 0.0

    def __call__(self, made: int, of: int, shown: dict[str, float]) -> None:
        """Report a part's progress, and numbers to show beside it."""
        if time.monotonic() - self.told > EVENT_SECONDS:
            self.told = time.monotonic()
            share = (self.part + made / of) / self.parts
            self.emit({"job": self.name, "share": share, "shown": shown})


def main() -> None:
    """Work through the plan named on the command line."""
    plan = Plan.parse(Path(sys.argv[1]).read_text())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(plan.jobs, RunStore(plan.store), plan.place, emit=_print)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held at the interpreter's end
        pass
    os._exit(1)  # at once: what is on disk is whole at any instant


def _print(event: Event) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
