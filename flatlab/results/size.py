"""The size of a network as a file, and how long it takes on a processor."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.resources import published
from flatlab.results.estimate import Stored, axes_of
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FLOATS = ("torch", "onnxruntime")  # engines of a network in full precision


@dataclass(frozen=True)
class FileSize(Saved):
    """The size of a run's network as a file.

    Attributes:
        bytes: of the exported file, its quantized weights packed.
        float_bytes: of all the network's tensors in float32.
    """

    bytes: int
    float_bytes: int

    @property
    def compression(self) -> float:
        """The actual compression: bytes in float32 over bytes of the file."""
        return self.float_bytes / self.bytes

    def to_frame(self) -> "pd.DataFrame":
        """Return one row: the bytes of the file, of float32, and their ratio."""
        import pandas as pd

        return pd.DataFrame([{**asdict(self), "compression": self.compression}])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the bytes of the file beside those of float32 as bars."""
        axes = axes_of(ax)
        axes.bar(["file", "float32"], [self.bytes, self.float_bytes])
        axes.set_ylabel("bytes")
        return axes

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file."""
        return {"bytes": np.array(self.bytes), "float_bytes": np.array(self.float_bytes)}, {}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns."""
        del facts
        return cls(int(arrays["bytes"]), int(arrays["float_bytes"]))


def median(values: FloatArray) -> tuple[float, float, float]:
    """Return the median and its interval of at least 95 %, from order statistics: no distribution is assumed."""
    from scipy.stats import binom  # takes a third of a second to load

    ordered, count = np.sort(values), len(values)
    first = max(int(binom.ppf(0.025, count, 0.5)) - 1, 0)
    return float(np.median(values)), float(ordered[first]), float(ordered[count - 1 - first])


@dataclass(frozen=True, eq=False, kw_only=True)
class Latency(Stored):
    """Times of engines that were called once in each round, with their sizes.

    Attributes:
        seconds: (E, T, B, rounds) of each call.
        networks: (E,) names.
        engines: (E,) torch, onnxruntime, weight-only, int8 or file.
        members: (E,) networks of an ensemble; 1 of one network.
        threads: (T,) numbers of threads.
        batches: (B,) images of a call.
        bytes: (E,) on disk; of torch the tensors.
        peaks: (E,) megabytes by which opening and calling an engine raises the memory of a process, at batch 32.
        accuracies: (E,) on images of the held-out domain; NaN where they were not evaluated.
        processor: its name and instruction sets.
        saturates: whether its kernels add int8 products in 16 bits.
        load: the system's load average over the minute before timing; None where it was not recorded.
    """

    seconds: FloatArray
    networks: tuple[str, ...]
    engines: tuple[str, ...]
    members: tuple[int, ...]
    threads: tuple[int, ...]
    batches: tuple[int, ...]
    bytes: tuple[int, ...]
    peaks: FloatArray
    accuracies: FloatArray
    processor: str
    saturates: bool
    load: float | None = None

    def to_frame(self) -> "pd.DataFrame":
        """Return a tidy table, one row for each engine, number of threads and batch; medians with 95 % intervals."""
        import pandas as pd

        rows = []
        for at in np.ndindex(*self.seconds.shape[:3]):
            engine, thread, batch = at
            value, low, high = (1000 * each for each in median(self.seconds[at]))
            what = {"network": self.networks[engine], "engine": self.engines[engine], "batch": self.batches[batch]}
            times = {"threads": self.threads[thread], "median_ms": value, "low_ms": low, "high_ms": high}
            size = {"bytes": self.bytes[engine], "peak_mb": self.peaks[engine], "accuracy": self.accuracies[engine]}
            rows.append({**what, **times, **size})
        return pd.DataFrame(rows)

    def fastest(self, network: str, at: tuple[int, int]) -> int | None:
        """Return the faster engine in floats of a network, by the median; None where there is none.

        Args:
            network: its name.
            at: places among the numbers of threads and of images.
        """
        own = [i for i, name in enumerate(self.networks) if name == network and self.engines[i] in FLOATS]
        return min(own, key=lambda i: float(np.median(self.seconds[i][at])), default=None)

    def ratio(self, slow: int, fast: int, at: tuple[int, int]) -> tuple[float, float, float]:
        """Return the median over rounds of the time of one engine over that of another, with its 95 % interval.

        Args:
            slow: the engine whose time is divided.
            fast: the engine whose time divides.
            at: places among the numbers of threads and of images.
        """
        return median(self.seconds[slow][at] / self.seconds[fast][at])

    @property
    def remarks(self) -> list[str]:
        """Sentences on the ratios of times, the load, what the processor lacks, and the paper's ratio."""
        sentences = []
        for at in np.ndindex(len(self.threads), len(self.batches)):
            thread, batch = at
            where = f"batch {self.batches[batch]}, threads {self.threads[thread]}"
            for index, (name, engine) in enumerate(zip(self.networks, self.engines, strict=True)):
                base = self.fastest(name, (thread, batch))
                if engine == "int8" and base is not None:
                    ratio = self.ratio(base, index, (thread, batch))
                    sentences.append(
                        f"{name}, {where}: int8 is {_interval(*ratio)} times as fast as full precision in"
                        f" {self.engines[base]}{_same(ratio)}."
                    )
            sentences += self._ensembles((thread, batch), where)
        if sentences:
            sentences.append("Each 95 % interval is that of one ratio alone; there is no joint correction.")
        if self.load is not None:
            sentences.append(f"Load average over the minute before timing: {self.load:.1f}.")
        if self.saturates:
            sentences.append(
                "This processor has no VNNI: int8 products are added up in 16 bits, which saturate with weights of 8 "
                "bits (export with --reduce-range); 7 bits (QT-DoG's) cannot."
            )
        paper = published()["misc"]["latency_ms_resnet50_amd_epyc_7302"]
        sentences.append(
            f"As published, not measured here: ResNet-50 on an AMD EPYC 7302 takes {paper['float32']} ms in full"
            f" precision and {paper['int8']} ms in int8, a ratio of {paper['float32'] / paper['int8']:.2f} (arXiv"
            f" 2410.06020, {paper['source']})."
        )
        return sentences

    def _ensembles(self, at: tuple[int, int], where: str) -> list[str]:
        """Return a sentence for each ensemble: its fastest engine beside one member in full precision."""
        sentences = []
        for name in dict.fromkeys(n for n, count in zip(self.networks, self.members, strict=True) if count > 1):
            own = [i for i, each in enumerate(self.networks) if each == name]
            fast = min(own, key=lambda i: float(np.median(self.seconds[i][at])))
            one = self.fastest(f"one member of {name.rpartition(' ')[2]}", at)
            if one is not None:
                times = _interval(*self.ratio(fast, one, at))
                sentences.append(
                    f"{name}, {where}: its {self.members[fast]} networks ({self.engines[fast]}) take {times} times as"
                    f" long as one in full precision ({self.engines[one]}), with"
                    f" {self.bytes[fast] / self.bytes[one]:.2f} times the bytes and"
                    f" {self.peaks[fast] / self.peaks[one]:.2f} times the memory; the paper states no computational or"
                    " memory overheads."
                )
        return sentences

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the medians for one thread and one image as bars with their intervals."""
        axes, found = axes_of(ax), self.to_frame()
        first = found[(found["threads"] == self.threads[0]) & (found["batch"] == self.batches[0])]
        sides = [first["median_ms"] - first["low_ms"], first["high_ms"] - first["median_ms"]]
        axes.barh(first["network"] + ", " + first["engine"], first["median_ms"], xerr=sides)
        axes.set_xlabel(f"milliseconds, batch {self.batches[0]}, threads {self.threads[0]}")
        return axes


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _same(ratio: tuple[float, float, float]) -> str:
    return ", not distinguishable from 1 at 95 %" if ratio[1] <= 1 <= ratio[2] else ""
