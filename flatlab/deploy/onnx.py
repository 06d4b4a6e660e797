"""A run's network as an ONNX file with integer weights, compared with the network on every evaluation image."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flatlab import files
from flatlab.deploy import session
from flatlab.deploy.calibration import ranges
from flatlab.deploy.graph import INPUT, OUTPUT, Codes, Graph
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network as network_of
from flatlab.quant.attach import Quantized, bake, channel_axis, quantized_layers, tensor_of
from flatlab.quant.codes import codes_of
from flatlab.quant.lsq import Activations
from flatlab.quant.packing import bits_of
from flatlab.specs.deploy import OnnxSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Run

IN, OUT = "in domain", "out of domain"  # validation images of the sources; all but the validation split of the target
MOST = 8  # bits of a code


@dataclass(frozen=True)
class Agreement:
    """A file beside its network on the same images.

    Attributes:
        domain: in domain (validation images of the sources) or out of domain (the held-out one).
        images: their number.
        agreement: the share whose class is the same.
        deviation: the largest difference of a logit.
        largest: the largest logit.
        accuracy: of the network.
        accuracy_onnx: of the file.
    """

    domain: str
    images: int
    agreement: float
    deviation: float
    largest: float
    accuracy: float
    accuracy_onnx: float


@dataclass(frozen=True)
class ExportedOnnx:
    """An ONNX file and how it agrees with its network.

    Attributes:
        path: the file.
        bytes: of the file.
        rows: in domain and out of it.
    """

    path: str
    bytes: int
    rows: tuple[Agreement, ...]

    def facts(self) -> dict[str, Any]:
        """Return all numbers by name."""
        return asdict(self)


def export_onnx(
    run: Run, path: Path, place: Place, spec: OnnxSpec | None = None, *, checkpoint: str = "selected"
) -> ExportedOnnx:
    """Write a run's network to an ONNX file, quantized weights as int8 codes, and compare the two.

    Ranges of int8 activations come from training images of the source domains. The head, and what is not quantized,
    compute in float32.

    Args:
        run: finished; of full precision, or quantized to a uniform grid of at most 8 bits; ensembles, too.
        path: the file, .onnx.
        place: data folder.
        spec: of the file.
        checkpoint: "selected" or "last".

    Raises:
        UserError: where a quantizer does not fit, or the network cannot be exported or run.
    """
    session.needed()
    run.require_done()
    spec = spec or OnnxSpec()
    network = network_of(run, checkpoint, place).cpu()
    domains = loading_data.domains(run.spec, place)
    count = spec.calibration_images if spec.activations == "int8" else 1
    write(network, path, spec, calibration(domains, count))
    rows = tuple(compare(network, path, name, each) for name, each in _images(domains).items())
    return ExportedOnnx(str(path), path.stat().st_size, rows)


def calibration(domains: loading_data.Domains, count: int) -> list[Any]:
    """Return the first training images of each source domain in batches (N, C, H, W), as arrays."""
    each = domains.calibration(count, torch.device("cpu"))
    return [inputs.contiguous().numpy() for one in each for inputs, _ in one]


def write(network: nn.Module, path: Path, spec: OnnxSpec, batches: list[Any]) -> None:
    """Bake a network and write it to an ONNX file, the weights that were quantized as int8 codes.

    Args:
        network: in eval mode, on the host.
        path: the file, .onnx.
        spec: of the file.
        batches: of images (N, C, H, W): the first is traced, and all calibrate int8 activations.

    Raises:
        UserError: where a quantizer does not fit, or the network cannot be exported.
    """
    codes = _codes(network, spec)
    bake(network)
    graph = Graph(network, torch.from_numpy(batches[0][:1]), opset=spec.opset)
    _put(graph, codes)
    graph.fold()
    if spec.activations == "int8":
        graph.round_activations(ranges(_in_floats(graph), batches, spec.calibration))
    files.write_bytes(path, graph.finished().SerializeToString())


def _codes(network: nn.Module, spec: OnnxSpec) -> dict[str, Codes]:
    """Return the integer weights of a network by name; refuse what int8 cannot hold."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, Activations):
            raise UserError(
                f"{name.removesuffix('.activations')} quantizes its inputs on a grid of its own, which this export does"
                " not write; export a run that quantizes weights alone (QT-DoG), with --activations int8 for integer"
                " activations."
            )
    for name, layer in quantized_layers(network).items():
        key, (low, high) = f"{name}.{tensor_of(layer.layer)}", layer.quantizer.levels
        if layer.quantizer.grid != "uniform" or bits_of(low, high) > MOST:
            raise UserError(
                f"{key} has {bits_of(low, high)} bits on a {layer.quantizer.grid} grid; ONNX files take uniform grids"
                f" of at most {MOST} bits: write --format packed."
            )
        found[key] = _codes_of(key, layer)
    if spec.activations == "int8" and not found:
        raise UserError("--activations int8 needs a run whose weights are quantized, such as QT-DoG's.")
    return found


def _codes_of(key: str, layer: Quantized) -> Codes:
    codes, scale = codes_of(key, layer), layer.quantizer.scale.detach()
    if channel_axis(layer.layer) and scale.numel() > 1:
        raise UserError(f"{key} has step sizes along its second axis; quantize it with --granularity tensor.")
    each = scale.reshape(-1).expand(codes.shape[0]) if scale.numel() == 1 else scale.reshape(-1)
    return Codes(codes.numpy().astype(np.int64), each.contiguous().numpy())


def _put(graph: Graph, codes: dict[str, Codes]) -> None:
    missing = sorted(codes.keys() - graph.weights.keys())
    if missing:
        raise UserError(f"{missing[0]} is not a tensor of the exported graph, so that its codes have no place there.")
    graph.codes.update(codes)


def _in_floats(graph: Graph) -> Graph:
    """Write the weights of codes into the graph as floats, which calibration computes with."""
    for name, each in graph.codes.items():
        shape = (-1, *[1] * (each.codes.ndim - 1))
        graph.weights[name] = (each.codes * each.scale.reshape(shape)).astype(np.float32)
    graph.write()
    return graph


def _images(domains: loading_data.Domains) -> dict[str, list[Any]]:
    device = torch.device("cpu")
    validation = domains.evaluation("out", domains.sources, device)
    target = domains.evaluation("in", (domains.target,), device)
    return {IN: [b for each in validation.values() for b in each], OUT: [b for each in target.values() for b in each]}


def compare(network: nn.Module, path: Path, domain: str, batches: list[Any]) -> Agreement:
    """Return how the classes and logits of a file agree with a network's on some images.

    Args:
        network: in eval mode.
        path: the file.
        domain: the images' name.
        batches: of images and labels.

    Raises:
        UserError: for a file of another network.
    """
    engine = session.opened(path)
    with torch.no_grad():
        pairs = [(network(x), _logits(engine, path, x.contiguous().numpy()), y) for x, y in batches]
    ours, theirs, labels = (torch.cat(each) for each in zip(*pairs, strict=True))
    if ours.shape != theirs.shape:
        raise UserError(
            f"{path} is of another network: it gives {theirs.shape[1]} classes, and {ours.shape[1]} are expected."
        )
    return Agreement(
        domain=domain,
        images=len(labels),
        agreement=float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        deviation=float((ours - theirs).abs().max()),
        largest=float(ours.abs().max()),
        accuracy=float((ours.argmax(1) == labels).double().mean()),
        accuracy_onnx=float((theirs.argmax(1) == labels).double().mean()),
    )


def _logits(engine: Any, path: Path, images: Any) -> torch.Tensor:
    wanted = next(iter(engine.get_inputs()))
    fits = all(not isinstance(one, int) or one == own for one, own in zip(wanted.shape, images.shape, strict=True))
    if wanted.name != INPUT or not fits:
        raise UserError(
            f"{path} is of another network: it takes {wanted.name} of {wanted.shape}, not images {images.shape}."
        )
    return torch.from_numpy(engine.run([OUTPUT], {INPUT: images})[0])
