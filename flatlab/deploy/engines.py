"""Networks that can be timed: in torch and onnxruntime, in floats, with integer weights and in int8."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flatlab.deploy import session
from flatlab.deploy.onnx import calibration, write
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network as network_of
from flatlab.models.networks import Ensemble, build_network
from flatlab.quant.attach import attach, bake, quantized_layers
from flatlab.specs.deploy import OnnxSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Run

BITS = 7  # of the weights of a network given by name, as in QT-DoG


@dataclass(frozen=True)
class Engine:
    """A network that can be called.

    Attributes:
        name: name of the network.
        how: torch, onnxruntime, weight-only, int8 or file.
        model: a module for torch, or a file for onnxruntime.
        shape: shape (C, H, W) of an image.
        integers: whether onnxruntime uses integer kernels; if not, codes become floats when the file is opened.
        members: number of an ensemble's members; 1 for a single network.
    """

    name: str
    how: str
    model: nn.Module | Path
    shape: tuple[int, ...]
    integers: bool = True
    members: int = 1

    @property
    def bytes(self) -> int:
        """Size of the file, or of the tensors of a module."""
        if isinstance(self.model, Path):
            return self.model.stat().st_size
        return sum(each.numel() * each.element_size() for each in self.model.state_dict().values())

    def images(self, count: int) -> npt.NDArray[np.float32]:
        """Return random images, the same in each call."""
        return np.random.default_rng(0).standard_normal((count, *self.shape), dtype=np.float32)

    def caller(self, images: npt.NDArray[np.float32], threads: int) -> Callable[[], Any]:
        """Return a function that computes the logits of a batch; a module uses the process's number of threads."""
        if isinstance(self.model, Path):
            engine = session.opened(self.model, threads=threads, integers=self.integers)
            return lambda: engine.run(None, {engine.get_inputs()[0].name: images})[0]
        model, inputs = self.model, torch.from_numpy(images).to(memory_format=torch.channels_last)

        def call() -> Any:
            with torch.inference_mode():
                return model(inputs).numpy()

        return call

    def accuracy(self, batches: Sequence[Any]) -> float:
        """Return the accuracy (0 to 1).

        Args:
            batches: pairs of images and labels.
        """
        found = [self.caller(x.contiguous().numpy(), 1)().argmax(1) == y.numpy() for x, y in batches]
        return float(np.concatenate(found).mean())


@contextmanager
def engines(
    runs: Sequence[Run], files: Sequence[Path], place: Place, *, named: tuple[str, int] | None = None
) -> Iterator[list[Engine]]:
    """Yield the engines of runs (in full precision, and in integers if quantized) and of ONNX files.

    The engines of an ensemble are followed by those of its first member in full precision.

    Args:
        runs: finished runs.
        files: ONNX files.
        place: data folder.
        named: name of a network and side of its images (pixels); its weights are random and quantized to 7 bits.

    Raises:
        UserError: a file cannot be run, or a network does not take images.
    """
    with TemporaryDirectory() as folder:
        found = [one for run in runs for one in _of_run(run, place, Path(folder))]
        found += _of_name(*named, Path(folder)) if named else []
        yield found + [_of_file(each) for each in files]


def _of_run(run: Run, place: Place, folder: Path) -> list[Engine]:
    batches = calibration(loading_data.domains(run.spec, place), OnnxSpec().calibration_images)
    if batches[0].ndim != 4:
        raise UserError(f"{run.name} is of sentences; only networks of images are timed.")
    network = network_of(run, "selected", place).cpu()
    found = of_network(f"{run.spec.label} {run.spec.digest[:8]}", network, batches, folder)
    if isinstance(network, Ensemble):
        found = [replace(each, members=len(network.members)) for each in found]
        bake(one := copy.deepcopy(network.members[0]))
        found += of_network(f"one member of {run.spec.digest[:8]}", one, batches, folder)
    return found


def _of_name(name: str, size: int, folder: Path) -> list[Engine]:
    network = build_network(name, num_classes=1000).eval()
    attach(network, bits=BITS)
    batches = [np.random.default_rng(0).standard_normal((8, 3, size, size), dtype=np.float32)]
    return of_network(name, network, batches, folder)


def of_network(name: str, network: nn.Module, batches: list[Any], folder: Path) -> list[Engine]:
    """Return the engines of a network: in floats by torch and onnxruntime and, if quantized, in integers.

    Args:
        name: name of the network.
        network: the network in eval mode, with quantizers if it has any; it is not changed.
        batches: images (N, C, H, W) for the calibration of int8 activations.
        folder: where the files are written.
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
