"""Executors: start workers on a plan and receive their events."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from flatlab import files
from flatlab.jobs.plan import Event, OnEvent, WorkPlan

# glibc returns large blocks to the system at each free, which takes up to 2.6 times as long; keep them instead. Huge
# pages make a training step of MobileNetV2 up to a fifth faster.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "THP_MEM_ALLOC_ENABLE": "1",
}
HERE = str(Path(__file__).parents[2])  # this package's folder


def worker_command(plan: Path | str) -> list[str]:
    """Return the command of a worker, which imports no modules from the current folder."""
    return [sys.executable, "-P", "-m", "flatlab.jobs.worker", str(plan), "--end-with-input"]


def worker_environment(threads: int) -> dict[str, str]:
    """Return the environment of a worker, in which this package precedes others of its name in PYTHONPATH."""
    paths = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**ALLOCATOR, **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}


def run_locally(plan: WorkPlan, *, workers: int, on_event: OnEvent) -> list[Event]:
    """Run a plan's jobs in worker processes on this machine, and wait.

    Args:
        plan: the jobs, their store and place.
        workers: processes; each computes with `plan.place.threads` threads.
        on_event: called with each event of each worker.

    Returns:
        The errors, as events: one for each job that no worker finished, and one for each worker that died, unless the
        others finished all jobs.
    """
    events: queue.Queue[Event] = queue.Queue()
    with files.scratch() as folder:
        path = folder / "plan.json"
        path.write_text(plan.canonical())
        with _workers(path, workers, plan.place.threads, events) as running:
            return _errors(running, events, on_event, {job.name for job in plan.jobs})


@contextmanager
def _workers(
    plan: Path, count: int, threads: int, events: "queue.Queue[Event]"
) -> Iterator[list[subprocess.Popen[str]]]:
    environment = {**worker_environment(threads), "PYTHONUNBUFFERED": "1"}
    command = worker_command(plan)
    pipe = subprocess.PIPE
    start = partial(
        subprocess.Popen, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )
    with ExitStack() as stack:
        running = [stack.enter_context(start(command)) for _ in range(count)]
        listeners = [threading.Thread(target=_listen, args=(process, events), daemon=True) for process in running]
        try:
            for listener in listeners:
                listener.start()
            yield running
        finally:
            for process, listener in zip(running, listeners, strict=True):
                if process.stdin:
                    process.stdin.close()  # the worker ends with it
                listener.join()


def _listen(process: "subprocess.Popen[str]", events: "queue.Queue[Event]") -> None:
    """Pass on a worker's events; if it ends with an error, its last output as well."""
    output: list[str] = []
    listener = threading.Thread(target=lambda: output.extend(process.stderr or ()), daemon=True)
    listener.start()
    for line in process.stdout or ():
        if line.startswith("{") and line.endswith("}\n"):  # other lines are a library's, or cut off by a kill
            events.put(json.loads(line))
    code = process.wait()
    listener.join()
    events.put({"ended": code, "trace": "".join(output)})


def _errors(
    running: "list[subprocess.Popen[str]]",
    events: "queue.Queue[Event]",
    on_event: OnEvent,
    jobs: set[str],
) -> list[Event]:
    failed: dict[str, Event] = {}
    died, finished, alive = list[Event](), set[str](), len(running)
    while alive:
        event = events.get()
        if "ended" in event:
            alive -= 1
            if event["ended"]:
                died.append({"job": "worker", "error": _why(event), **event})
            continue
        on_event(event)
        if "error" in event:
            failed.setdefault(event["job"], event)
        if event.get("finished"):
            finished.add(event["job"])
    if jobs and finished >= jobs:
        for event in died:
            on_event({"job": "worker", "note": f"A worker was lost: {event['error']} The others finished its jobs."})
        return []
    return [*died, *(event for job, event in failed.items() if job not in finished)]


def _why(event: Event) -> str:
    """Return why a worker ended, and how to continue."""
    if event["ended"] == -signal.SIGKILL:
        return "it was killed, perhaps for lack of memory; use fewer --workers or a smaller --image-size, and repeat."
    if event["ended"] in (128 + signal.SIGTERM, -signal.SIGTERM):
        return "it was stopped by SIGTERM; finished work is kept: repeat the command to continue."
    return f"it ended with status {event['ended']}: {event['trace'].strip().rpartition(chr(10))[2]}"
