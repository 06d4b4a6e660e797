"""Executors: they start workers on a plan and hear their events; they know commands, not science."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from flatlab.jobs import Plan

Event = dict[str, Any]

# glibc gives large blocks back to the system at each free, which costs up to 2.6 times; keep them instead.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def run_locally(plan: Plan, *, workers: int, hear: Callable[[Event], None]) -> list[Event]:
    """Run a plan's jobs in worker processes on this machine, and wait.

    Args:
        plan: the jobs, their store and place.
        workers: processes; each computes with `plan.place.threads` threads.
        hear: called with each event of each worker.

    Returns:
        The errors, as events; a job that two workers met and failed is told once.
    """
    heard: queue.Queue[Event] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="flatlab-") as folder:
        path = Path(folder) / "plan.json"
        path.write_text(plan.canonical())
        with _workers(path, workers, plan.place.threads, heard) as running:
            return list(_errors(running, heard, hear))


@contextmanager
def _workers(
    plan: Path, count: int, threads: int, heard: "queue.Queue[Event]"
) -> Iterator[list[subprocess.Popen[str]]]:
    environment = {**ALLOCATOR, **os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "flatlab.work", str(plan)]
    pipe = subprocess.PIPE
    start = partial(
        subprocess.Popen, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    )
    with ExitStack() as stack:
        running = [stack.enter_context(start(command)) for _ in range(count)]
        listeners = [threading.Thread(target=_listen, args=(process, heard), daemon=True) for process in running]
        try:
            for listener in listeners:
                listener.start()
            yield running
        finally:
            for process, listener in zip(running, listeners, strict=True):
                if process.stdin:
                    process.stdin.close()  # the worker ends with it
                listener.join()


def _listen(process: "subprocess.Popen[str]", heard: "queue.Queue[Event]") -> None:
    """Pass on a worker's events; where it dies unasked, tell its last words."""
    last_words: list[str] = []
    listener = threading.Thread(target=_collect, args=(process.stderr, last_words), daemon=True)
    listener.start()
    for line in process.stdout or ():
        if line.startswith("{") and line.endswith("}\n"):  # else it is a library's, or half of one cut off by a kill
            heard.put(json.loads(line))
    code = process.wait()
    listener.join()
    heard.put({"ended": code, "trace": "".join(last_words)})


def _collect(stream: IO[str] | None, lines: list[str]) -> None:
    lines.extend(stream or ())


def _errors(
    running: "list[subprocess.Popen[str]]", heard: "queue.Queue[Event]", hear: Callable[[Event], None]
) -> Iterator[Event]:
    told = set()
    alive = len(running)
    while alive:
        event = heard.get()
        if "ended" in event:
            alive -= 1
            if event["ended"]:
                yield {"job": "worker", "error": _last_words(event), **event}
            continue
        hear(event)
        if "error" in event and event["job"] not in told:
            told.add(event["job"])
            yield event


def _last_words(event: Event) -> str:
    if event["ended"] == -signal.SIGKILL:
        return "it was killed, perhaps for want of memory; take fewer --workers or a smaller --image-size, and go on."
    return f"it ended with status {event['ended']}: {event['trace'].strip().rpartition(chr(10))[2]}"
