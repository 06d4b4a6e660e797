"""How long networks take on this processor, and how much memory: engines called in turn, medians with intervals."""

import copy
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy import stats
from torch import nn

from flatlab import environment
from flatlab.deploy import session
from flatlab.deploy.onnx import calibration, write
from flatlab.environment import cores
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network as network_of
from flatlab.quant.attach import bake, quantized_layers
from flatlab.resources import published
from flatlab.specs.deploy import OnnxSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Run

FloatArray = npt.NDArray[np.float64]
STATUS = Path("/proc/self/status")
BATCHES, WARM = (1, 32), 3  # images a call; calls of each engine that are not timed


@dataclass(frozen=True)
class Engine:
    """A network that can be called.

    Attributes:
        name: of the network.
        how: torch, onnxruntime, weight-only or int8.
        model: for torch, or a file for onnxruntime.
        shape: of an image.
        integers: whether sums are of integers where the file says so.
    """

    name: str
    how: str
    model: nn.Module | Path
    shape: tuple[int, ...]
    integers: bool = True

    @property
    def bytes(self) -> int:
        """On disk; of torch the tensors."""
        if isinstance(self.model, Path):
            return self.model.stat().st_size
        return sum(each.numel() * each.element_size() for each in self.model.state_dict().values())

    def images(self, count: int) -> npt.NDArray[np.float32]:
        """Return random images, the same in each call."""
        return np.random.default_rng(0).standard_normal((count, *self.shape), dtype=np.float32)

    def caller(self, count: int, threads: int) -> Callable[[], Any]:
        """Return a function that computes the logits of a batch; torch's threads are the process's."""
        images = self.images(count)
        if isinstance(self.model, Path):
            engine = session.opened(self.model, threads=threads, integers=self.integers)
            return lambda: engine.run(None, {engine.get_inputs()[0].name: images})
        model, inputs = self.model, torch.from_numpy(images).to(memory_format=torch.channels_last)

        def call() -> Any:
            with torch.inference_mode():
                return model(inputs)

        return call


@contextmanager
def engines(runs: Sequence[Run], files: Sequence[Path], place: Place) -> Iterator[list[Engine]]:
    """Yield the engines of runs (full precision, and quantized ones in integers) and of ONNX files.

    Raises:
        UserError: for a file that cannot be run, or is not of images.
    """
    with TemporaryDirectory() as folder:
        found = [one for run in runs for one in _of_run(run, place, Path(folder))]
        yield found + [_of_file(each) for each in files]


def _of_run(run: Run, place: Place, folder: Path) -> list[Engine]:
    batches = calibration(loading_data.domains(run.spec, place), OnnxSpec().calibration_images)
    network = network_of(run, "selected", place).cpu()
    return of_network(f"{run.spec.label} {run.spec.digest[:8]}", network, batches, folder)


def of_network(name: str, network: nn.Module, batches: list[Any], folder: Path) -> list[Engine]:
    """Return the engines of a network: in floats by torch and onnxruntime, and where it is quantized in integers.

    Args:
        name: of the network.
        network: in eval mode, its quantizer attached if it has one; left alone.
        batches: of images that int8 activations are calibrated on.
        folder: for the files.
    """
    plain, shape, stem = copy.deepcopy(network), tuple(batches[0].shape[1:]), name.replace(" ", "-").replace("/", "-")
    bake(plain)
    found = [Engine(name, "torch", plain, shape)]
    ways: list[tuple[str, nn.Module, OnnxSpec]] = [("onnxruntime", plain, OnnxSpec())]
    if quantized_layers(network):
        ways += [("weight-only", network, OnnxSpec()), ("int8", network, OnnxSpec(activations="int8"))]
    for how, model, spec in ways:
        path = folder / f"{stem}-{how}.onnx"
        write(copy.deepcopy(model), path, spec, batches)
        found.append(Engine(name, how, path, shape, integers=how != "weight-only"))
    return found


def _of_file(path: Path) -> Engine:
    if not path.is_file():
        raise UserError(f"{path} is no file; name one that `flatlab export RUN --format onnx` has written.")
    shape = session.opened(path).get_inputs()[0].shape[1:]
    if len(shape) != 3 or not all(isinstance(each, int) for each in shape):
        raise UserError(
            f"{path} takes inputs of {shape}; images of a fixed size (channels, height, width) are expected."
        )
    return Engine(path.name, "file", path, tuple(shape))


def table(engines: Sequence[Engine], *, rounds: int = 30) -> list[dict[str, Any]]:
    """Return the time of each engine for each batch and number of threads, with its bytes and memory.

    Args:
        engines: are called in turn, from another one on in each round.
        rounds: timed calls of each.
    """
    peaks = [peak(each) for each in engines]
    rows = []
    for threads in dict.fromkeys((1, cores())):
        for batch in BATCHES:
            with loading_data.threads(threads):
                times = interleaved([each.caller(batch, threads) for each in engines], rounds)
            for each, own, memory in zip(engines, times, peaks, strict=True):
                what: dict[str, Any] = {"network": each.name, "engine": each.how, "batch": batch, "threads": threads}
                rows.append({**what, **median(1000 * own), "bytes": each.bytes, "peak_mb": memory})
    return rows


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> FloatArray:
    """Return the seconds (E, rounds) of each call; all are called once in a round, a different one first."""
    for call in calls:
        for _ in range(WARM):
            call()
    times = np.zeros((len(calls), rounds))
    for turn in range(rounds):
        for index in np.roll(np.arange(len(calls)), -turn).tolist():
            started = time.perf_counter()
            calls[index]()
            times[index, turn] = time.perf_counter() - started
    return times


def median(values: FloatArray) -> dict[str, float]:
    """Return the median and its interval of at least 95 %, from order statistics: no distribution is assumed."""
    ordered, count = np.sort(values), len(values)
    first = max(int(stats.binom.ppf(0.025, count, 0.5)) - 1, 0)
    ends = float(ordered[first]), float(ordered[count - 1 - first])
    return {"median_ms": float(np.median(values)), "low_ms": ends[0], "high_ms": ends[1]}


def peak(engine: Engine) -> float:
    """Return by how many megabytes opening and calling an engine raises the memory of a process, at batch 32."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_raised, engine).result()


def _raised(engine: Engine) -> float:
    if not STATUS.exists():
        return float("nan")
    STATUS.with_name("clear_refs").write_text("5")  # the peak is what is held now, without that of the imports
    before = _held()
    torch.set_num_threads(1)
    engine.caller(BATCHES[-1], 1)()
    return _held() - before


def _held() -> float:
    """Return the most megabytes that this process has held (of Linux; `getrusage` counts the parent's, too)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def machine() -> str:
    """Return the processor and its instruction sets."""
    facts = environment.facts()
    return f"{facts['processor']} ({facts['instructions']})"


def remarks(rows: pd.DataFrame) -> list[str]:
    """Return sentences: int8 against the faster engine in floats, what the processor lacks, and the paper's numbers."""
    found = []
    for (name, batch, threads), own in rows.groupby(["network", "batch", "threads"]):
        times = dict(zip(own["engine"], own["median_ms"], strict=True))
        if "int8" in times:
            ratio = min(times["torch"], times["onnxruntime"]) / times["int8"]
            found.append(f"{name}, batch {batch}, threads {threads}: int8 is {ratio:.2f} times as fast as floats.")
    if "vnni" not in environment.facts()["instructions"]:
        found.append(
            "This processor has no VNNI: int8 products are added up in 16 bits, which saturate with weights of 8 bits;"
            " 7 bits (QT-DoG's) cannot."
        )
    paper = published()["misc"]["latency_ms_resnet50_amd_epyc_7302"]
    found.append(
        f"As published, not measured here: ResNet-50 on an AMD EPYC 7302 takes {paper['float32']} ms in full precision"
        f" and {paper['int8']} ms in int8, a ratio of {paper['float32'] / paper['int8']:.2f} (arXiv 2410.06020,"
        f" {paper['source']})."
    )
    return found
