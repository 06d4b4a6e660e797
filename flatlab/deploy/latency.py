"""Latency and memory of networks on this processor: each engine is called once in each round."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatlab import environment
from flatlab.arguments import FloatArray
from flatlab.deploy import session
from flatlab.deploy.engines import Engine
from flatlab.environment import cores
from flatlab.loading import data as loading_data
from flatlab.results.size import Latency

STATUS = Path("/proc/self/status")
BATCHES, WARM = (1, 32), 3  # images of a call; untimed calls of each engine


def timed(engines: Sequence[Engine], *, rounds: int = 30, accuracies: Sequence[float] | None = None) -> Latency:
    """Return the times of each engine for each number of threads and batch size, with its bytes and memory.

    Args:
        engines: the engines; each is called once in each round.
        rounds: timed calls of each engine.
        accuracies: accuracies of the engines; NaN if not given.
    """
    threads, load = tuple(dict.fromkeys((1, cores()))), environment.load()  # before the timing adds to it
    return Latency(
        seconds=np.stack([_seconds(engines, each, rounds) for each in threads], axis=1),
        networks=tuple(each.name for each in engines),
        engines=tuple(each.how for each in engines),
        members=tuple(each.members for each in engines),
        threads=threads,
        batches=BATCHES,
        bytes=tuple(each.bytes for each in engines),
        peaks=np.array([peak(each) for each in engines]),
        accuracies=np.array([float("nan")] * len(engines) if accuracies is None else accuracies),
        processor=machine(),
        saturates=session.saturates(),
        load=load,
    )


def _seconds(engines: Sequence[Engine], threads: int, rounds: int) -> FloatArray:
    """Return the seconds (E, B, rounds) with a number of threads."""
    with loading_data.computing(threads):
        return np.stack(
            [interleaved([e.caller(e.images(batch), threads) for e in engines], rounds) for batch in BATCHES], axis=1
        )


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> FloatArray:
    """Return the seconds (E, rounds) of each call; in each round all are called once, in a random order.

    A small network that is called after a large one finds cold caches and is slower; a random order balances this.
    """
    for call in calls:
        for _ in range(WARM):
            call()
    times, rng = np.zeros((len(calls), rounds)), np.random.default_rng(0)
    for turn in range(rounds):
        for index in rng.permutation(len(calls)).tolist():
            started = time.perf_counter()
            calls[index]()
            times[index, turn] = time.perf_counter() - started
    return times


def peak(engine: Engine) -> float:
    """Return the increase of a process's memory (MB) by opening and calling an engine, with 32 images."""
    context = multiprocessing.get_context("forkserver")  # starts a process without this one's memory in milliseconds
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_raised, engine).result()


def _raised(engine: Engine) -> float:
    if not STATUS.exists():
        return float("nan")
    session.needed()
    STATUS.with_name("clear_refs").write_text("5")  # resets the peak, which the imports have raised
    before = _held()
    torch.set_num_threads(1)
    engine.caller(engine.images(BATCHES[-1]), 1)()
    return _held() - before


def _held() -> float:
    """Return the peak memory of this process (MB), from Linux; `getrusage` would include the parent's."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def machine() -> str:
    """Return the processor and its instruction sets."""
    facts = environment.facts()
    return f"{facts['processor']} ({facts['instructions']})"
