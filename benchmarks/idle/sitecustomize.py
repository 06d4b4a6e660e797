"""Imported by each Python process with this folder in PYTHONPATH: trainings sleep instead, and waits are counted.

A job takes FLATLAB_IDLE_SECONDS and writes a small finished run, so that what an engine adds is seen without a core
that computes. Times of a process that did jobs are written to the folder FLATLAB_IDLE_TIMES after each of them.
"""

import fcntl
import json
import os
import sys
import threading
import time
from functools import wraps
from types import ModuleType

SECONDS = {"locks": 0.0, "checks": 0.0, "polls": 0.0}  # of the main thread
processor: list[float] = []  # processor time of this process at the beginning of each job
sleep = time.sleep
TOKEN = os.urandom(4).hex()  # processes of two nodes may have the same id


def counted(owner: ModuleType, name: str, kind: str) -> None:
    """Add the time of each call of a function to a kind."""
    act = getattr(owner, name)

    @wraps(act)
    def timed(*args, **options):
        started = time.perf_counter()
        try:
            return act(*args, **options)
        finally:
            if threading.current_thread() is threading.main_thread():
                SECONDS[kind] += time.perf_counter() - started

    setattr(owner, name, timed)


def train(specs, store, place, **_) -> None:
    """Sleep, and write finished runs."""
    import finished

    processor.append(time.process_time())
    sleep(float(os.environ["FLATLAB_IDLE_SECONDS"]))
    finished.fill(store, [(spec, []) for spec in specs])
    path = os.path.join(os.environ["FLATLAB_IDLE_TIMES"], f"{os.getpid()}-{TOKEN}.json")
    with open(path, "w") as file:
        json.dump({**SECONDS, "processor": processor}, file)


if "FLATLAB_IDLE_TIMES" in os.environ:
    counted(fcntl, "flock", "locks")
    counted(os, "stat", "checks")
    counted(time, "sleep", "polls")
    sys.modules["flatlab.train.loop"] = ModuleType("flatlab.train.loop")
    sys.modules["flatlab.train.loop"].train = train
