"""A run's network as an ONNX file with integer weights, compared with the network on every evaluation image."""

from collections.abc import Sequence
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
from flatlab.errors import UserError, count_of, reason
from flatlab.loading import data as loading_data
from flatlab.loading.checkpoint import network as network_of
from flatlab.models.networks import Ensemble
from flatlab.quant.attach import Quantized, bake, channel_axis, quantized_layers, tensor_of
from flatlab.quant.codes import codes_of
from flatlab.quant.lsq import Activations
from flatlab.quant.packing import bits_of
from flatlab.specs.deploy import OnnxSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Run

MOST = 8  # largest number of bits of a code


@dataclass(frozen=True)
class Agreement:
    """Comparison of a file with its network on the same images.

    Attributes:
        domain: "source" (validation images of the source domains) or "target" (the held-out domain).
        images: number of images.
        agreement: fraction of the images with the same predicted class.
        deviation: largest absolute difference of a logit.
        largest: largest absolute logit of the network.
        accuracy: accuracy of the network.
        accuracy_onnx: accuracy of the file.
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
    """An ONNX file, compared with its network.

    Attributes:
        path: the file.
        bytes: size of the file.
        rows: the comparisons on source domains and target.
        products: number of quantized weights in matrix products, which are computed in floats.
        exceeding: fraction of the quantized channels in which the sum of two int8 products can exceed 16 bits.
        saturation: largest absolute difference of a logit of a calibration image between this processor's integer
            kernels and sums in floats, which includes the effect of the order of sums.
    """

    path: str
    bytes: int
    rows: tuple[Agreement, ...]
    products: int = 0
    exceeding: float = 0.0
    saturation: float = 0.0

    @property
    def remarks(self) -> list[str]:
        """Sentences on matrix products in floats and on sums that exceed 16 bits, if there are any."""
        found = []
        if self.products:
            found.append(
                f"{self.products} quantized weights are of matrix products, which are computed in floats; onnxruntime"
                f" rounds their inputs to 8 bits, unless the session's entry {session.EXACT[0]} is {session.EXACT[1]},"
                " as it is here."
            )
        if not self.exceeding:
            return found
        here = "as on this processor" if session.saturates() else "unlike this processor, which has it"
        return [
            *found,
            f"In {self.exceeding:.1%} of the quantized channels the sum of two products can exceed 16 bits, in which"
            f" kernels add them without VNNI ({here}): here logits differ by up to {self.saturation:.2g} from those of"
            " sums in floats. --reduce-range rounds activations to 128 levels, where no such sum exceeds 16 bits.",
        ]

    def facts(self) -> dict[str, Any]:
        """Return all numbers by name."""
        return asdict(self)


def export_onnx(
    run: Run | Sequence[Run],
    path: Path,
    place: Place,
    spec: OnnxSpec | None = None,
    *,
    checkpoint: str = "selected",
    combine: str = "logits",
) -> ExportedOnnx:
    """Write a run's network, or the ensemble of several, to an ONNX file with int8 weights; compare file and network.

    Ranges of int8 activations are those of training images of the source domains. The head and all layers that are not
    quantized compute in float32.

    Args:
        run: a finished run, in full precision or quantized to a uniform grid of at most 8 bits, or an ensemble; several
            runs become the members of an ensemble.
        path: the file, .onnx.
        place: data folder.
        spec: options of the file.
        checkpoint: "selected" or "last".
        combine: what an ensemble of several runs averages, "logits" or "probabilities".

    Raises:
        UserError: a quantizer is not supported, runs are not of one split of one data set, or the network cannot be
            exported or run.
    """
    session.needed()
    runs, spec = [run] if isinstance(run, Run) else list(run), spec or OnnxSpec()
    if len(runs) > 1:  # refuses those that cannot be members of one ensemble
        runs[0].spec.replace(members=tuple(each.spec for each in runs), combine=combine)
    for each in runs:
        each.require_done()
    members = [network_of(each, checkpoint, place).cpu() for each in runs]
    network = Ensemble(members, combine=combine).eval() if len(members) > 1 else members[0]
    domains = loading_data.domains(runs[0].spec, place)
    batches = calibration(domains, spec.calibration_images if spec.activations == "int8" else 1)
    graph = write(network, path, spec, batches)
    rows = tuple(compare(network, path, name, each) for name, each in evaluated(domains).items())
    differs = _saturation(path, batches) if graph.exceeding else 0.0
    return ExportedOnnx(str(path), path.stat().st_size, rows, graph.products, graph.exceeding, differs)


def _saturation(path: Path, batches: list[Any]) -> float:
    """Return the largest absolute difference of a logit between a file's integer kernels and its sums in floats."""
    kernels = [session.opened(path, integers=each) for each in (True, False)]
    pairs = [[kernel.run([OUTPUT], {INPUT: batch})[0] for kernel in kernels] for batch in batches]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def calibration(domains: loading_data.Domains, count: int) -> list[Any]:
    """Return the first training images of each source domain in batches (N, C, H, W), as arrays."""
    each = domains.calibration(count, torch.device("cpu"))
    return [inputs.contiguous().numpy() for one in each for inputs, _ in one]


def write(network: nn.Module, path: Path, spec: OnnxSpec, batches: list[Any]) -> Graph:
    """Bake a network in place and write it to an ONNX file with quantized weights as int8 codes; return its graph.

    Args:
        network: the network in eval mode, on the CPU.
        path: the file, .onnx.
        spec: options of the file.
        batches: images (N, C, H, W); the first is used for tracing, and all for the calibration of int8 activations.

    Raises:
        UserError: a quantizer is not supported, or the network cannot be exported.
    """
    codes = _codes(network, spec)
    bake(network)
    graph = Graph(network, torch.from_numpy(batches[0][:1]), opset=spec.opset)
    _put(graph, codes)
    graph.fold()
    top = 127 if spec.reduce_range else 255
    if spec.activations == "int8":
        graph.round_activations(ranges(_in_floats(graph), batches, spec.calibration, top=top))
    files.write_bytes(path, graph.finished().SerializeToString())
    return graph


def _codes(network: nn.Module, spec: OnnxSpec) -> dict[str, Codes]:
    """Return the integer weights of a network by name; refuse those that int8 cannot represent."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, Activations):
            raise UserError(
                f"{name.removesuffix('.activations')} quantizes its inputs on a learned grid, which ONNX export does"
                " not support: export a run that quantizes weights only (QT-DoG), with --activations int8 for integer"
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
    if spec.reduce_range and spec.activations != "int8":
        raise UserError("--reduce-range does nothing without --activations int8; leave it out.")
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
        raise UserError(f"{missing[0]} is not a tensor of the exported graph, so its codes cannot be written.")
    graph.codes.update(codes)


def _in_floats(graph: Graph) -> Graph:
    """Write quantized weights into the graph as floats, for calibration."""
    for name, each in graph.codes.items():
        shape = (-1, *[1] * (each.codes.ndim - 1))
        graph.weights[name] = (each.codes * each.scale.reshape(shape)).astype(np.float32)
    graph.write()
    return graph


def evaluated(domains: loading_data.Domains) -> dict[str, list[Any]]:
    """Return the batches of images and labels: the "out" split of the sources, the "in" split of the target."""
    device = torch.device("cpu")
    validation = domains.evaluation("out", domains.validated, device)
    target = domains.evaluation("in", (domains.target,), device)
    of = {"source": validation, "target": target}
    return {name: [batch for batches in each.values() for batch in batches] for name, each in of.items()}


def compare(network: nn.Module, path: Path, domain: str, batches: list[Any]) -> Agreement:
    """Return a comparison of the classes and logits of a file with those of a network.

    Args:
        network: the network in eval mode.
        path: the file.
        domain: name of the images.
        batches: pairs of images and labels.

    Raises:
        UserError: the file is of another network, or cannot be run.
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
    try:
        return torch.from_numpy(engine.run([OUTPUT], {INPUT: images})[0])
    except Exception as error:  # onnxruntime's classes have no common base but this one
        failed = f"onnxruntime cannot run {path} for {count_of(len(images), 'image')} ({reason(error).rstrip('.')})"
        if len(images) == 1 or not _runs(engine, images[:1]):
            raise UserError(f"{failed}: write --format packed.") from None
        raise UserError(
            f"{failed}, but for one image: the network must take their number from tensor.shape[0], not from"
            " len(tensor), which is a constant in the file."
        ) from None


def _runs(engine: Any, images: Any) -> bool:
    """Return whether onnxruntime computes these images."""
    try:
        engine.run([OUTPUT], {INPUT: images})
    except Exception:  # as above; the caller reports the error of the whole batch
        return False
    return True
