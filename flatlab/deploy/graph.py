"""A network as an ONNX graph: BatchNorm folded into convolutions, weights as integer codes, activations as int8."""

import warnings
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from flatlab.errors import UserError, reason

Array = npt.NDArray[Any]
INPUT, OUTPUT = "images", "logits"
LARGEST = 2**15 - 1  # the largest integer of 16 bits
PASSING = ("Relu", "Clip")  # operators that an engine merges with the layer before them
ROUNDED = ("Conv", "Relu", "Clip", "Add", "GlobalAveragePool", "AveragePool")  # whose outputs are rounded to int8


@dataclass(frozen=True)
class Codes:
    """A weight as integers: codes c (C, ...) and step sizes s (C,) of its output channels, w = s c."""

    codes: npt.NDArray[np.int64]
    scale: npt.NDArray[np.float32]

    def times(self, factor: Array) -> "Codes":
        """Return the codes of the weight times a factor (C,); step sizes stay positive."""
        sign = np.where(factor < 0, -1, 1).reshape(-1, *[1] * (self.codes.ndim - 1))
        return Codes(self.codes * sign, (self.scale * np.abs(factor)).astype(np.float32))

    def fitting(self, kind: np.dtype[Any], *, level: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return codes within an integer type, and the zero points (C,).

        A channel whose sign BatchNorm reversed can exceed the type; its codes are shifted, which is exact.

        Args:
            kind: int8 or uint8.
            level: whether all zero points must be 0, as integer kernels require; a code 128 then becomes 127.

        Raises:
            UserError: codes exceed the type by more than that.
        """
        each, ends = self.codes.reshape(len(self.codes), -1), np.iinfo(kind)
        zero = np.maximum(ends.min - each.min(1), 0) + np.minimum(ends.max - each.max(1), 0)
        if not level:
            return self.codes + zero.reshape(-1, *[1] * (self.codes.ndim - 1)), zero
        if np.abs(zero).max() > 1:
            raise UserError(
                "--activations int8 needs weights whose codes lie between -128 and 127 behind BatchNorm, got unsigned "
                "codes of 8 bits and a negative gain. Leave --activations out, or train fewer bits or signed codes."
            )
        return np.clip(self.codes, ends.min, ends.max), np.zeros_like(zero)


@dataclass(frozen=True)
class Range:
    """The range of an activation's values, extended to contain 0.

    Attributes:
        low: the lowest value.
        high: the highest value.
        top: the highest code; the lowest is 0.
    """

    low: float
    high: float
    top: int = 255

    @property
    def grid(self) -> tuple[np.float32, np.uint8]:
        """The step size and the code of zero."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        scale = (high - low) / self.top or 1.0
        return np.float32(scale), np.uint8(round(-low / scale))


class Graph:
    """The graph of a network with its weights, which is changed in place.

    Args:
        network: the network in eval mode, with baked weights.
        images: (N, C, H, W), an example of its inputs.
        opset: version of ONNX's operators.

    Raises:
        UserError: an operator of the network, or the version, cannot be exported.
    """

    def __init__(self, network: nn.Module, images: Tensor, *, opset: int) -> None:
        self.model = onnx.load_from_string(_exported(network, images, opset))
        self.proto = self.model.graph
        self.weights = {each.name: numpy_helper.to_array(each) for each in self.proto.initializer}
        self.codes: dict[str, Codes] = {}
        self.top = 0  # the highest code of an activation; 0 where they are not rounded
        for node in [each for each in self.proto.node if each.op_type == "Identity" and each.input[0] in self.weights]:
            self.weights[node.output[0]] = self.weights[node.input[0]]
            self.proto.node.remove(node)

    def before(self, name: str) -> Any | None:
        """Return the node that computes a tensor; None for inputs and weights."""
        return next((node for node in self.proto.node if name in node.output), None)

    def after(self, name: str) -> list[Any]:
        """Return the nodes that read a tensor."""
        return [node for node in self.proto.node if name in node.input]

    def fold(self) -> None:
        """Fold each BatchNorm behind a convolution into its weight and bias; codes change at most their sign."""
        for norm in [each for each in self.proto.node if each.op_type == "BatchNormalization"]:
            layer = self.before(norm.input[0])
            if layer is None or layer.op_type != "Conv" or len(self.after(norm.input[0])) > 1:
                continue
            gain, shift, mean, variance = (self.weights[name].astype(np.float64) for name in norm.input[1:5])
            epsilon = next((each.f for each in norm.attribute if each.name == "epsilon"), 1e-5)
            factor = gain / np.sqrt(variance + epsilon)
            name = layer.input[1]
            if name in self.codes:
                self.codes[name] = self.codes[name].times(factor)
            else:
                wide = self.weights[name] * factor.reshape(-1, *[1] * (self.weights[name].ndim - 1))
                self.weights[name] = wide.astype(np.float32)
            bias = self.weights[layer.input[2]] if len(layer.input) > 2 else 0.0
            self._bias(layer, shift + (bias - mean) * factor)
            layer.output[0] = norm.output[0]
            self.proto.node.remove(norm)

    def _bias(self, layer: Any, values: Array) -> None:
        name = f"{layer.input[1]}.bias"
        self.weights[name] = values.astype(np.float32)
        del layer.input[2:]
        layer.input.append(name)

    def rounded(self) -> list[str]:
        """Return the tensors that int8 activations round, in the order of the network."""
        outputs = [node.output[0] for node in self.proto.node if node.op_type in ROUNDED]
        return [name for name in (INPUT, *outputs) if self._is_rounded(name)]

    def _is_rounded(self, name: str) -> bool:
        readers = self.after(name)
        merged = len(readers) == 1 and readers[0].op_type in PASSING and name != INPUT
        return not merged and any(self._in_integers(node) for node in readers)

    def _in_integers(self, node: Any) -> bool:
        """Return whether a node computes in integers, or is followed by one that does."""
        if node.op_type in ("MaxPool", "Add"):
            return any(self._leads_on(each) for each in self.after(node.output[0]))
        return node.op_type == "GlobalAveragePool" or (node.op_type == "Conv" and node.input[1] in self.codes)

    def _leads_on(self, node: Any) -> bool:
        if node.op_type in PASSING:
            return any(self._leads_on(each) for each in self.after(node.output[0]))
        return self._in_integers(node)

    def round_activations(self, ranges: dict[str, Range]) -> None:
        """Round tensors to the levels of their ranges, and the biases of integer layers to the grid of their sums.

        Args:
            ranges: ranges of the tensors that `rounded` names; outputs of MaxPool have the range of its inputs.
        """
        self.top = max(each.top for each in ranges.values())
        for node in [each for each in self.proto.node if each.op_type == "MaxPool" and each.input[0] in ranges]:
            ranges = {**ranges, node.output[0]: ranges[node.input[0]]}
        for name, each in ranges.items():
            scale, zero = each.grid
            self.weights |= {f"{name}.step": np.asarray(scale), f"{name}.zero": np.asarray(zero)}
            readers = self.after(name)
            for node in readers:
                node.input[:] = [f"{name}.rounded" if one == name else one for one in node.input]
            own = [f"{name}.step", f"{name}.zero"]
            self.proto.node.extend(
                [
                    helper.make_node("QuantizeLinear", [name, *own], [f"{name}.codes"]),
                    helper.make_node("DequantizeLinear", [f"{name}.codes", *own], [f"{name}.rounded"]),
                ]
            )
        for node in [each for each in self.proto.node if each.op_type == "Conv" and each.input[1] in self.codes]:
            source = node.input[0].removesuffix(".rounded")
            if len(node.input) > 2 and source in ranges:
                step = (ranges[source].grid[0] * self.codes[node.input[1]].scale).astype(np.float32)
                whole = np.clip(np.rint(self.weights.pop(node.input[2]) / step), -(2**31), 2**31 - 1)
                self._codes_of(node.input[2], whole.astype(np.int32), step)

    def _codes_of(self, name: str, codes: Array, scale: Array, zero: Array | int = 0) -> None:
        """Replace a tensor by a node that computes it from integer codes with zero points `zero` (C,)."""
        origin = np.broadcast_to(np.asarray(zero, codes.dtype), scale.shape)
        self.weights |= {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.origin": origin}
        parts = [f"{name}.codes", f"{name}.scale", f"{name}.origin"]
        self.proto.node.append(helper.make_node("DequantizeLinear", parts, [name], axis=0))

    @property
    def products(self) -> int:
        """The number of quantized weights in matrix products, which are computed in floats."""
        convolved = {node.input[1] for node in self.proto.node if node.op_type == "Conv"}
        return len(self.codes.keys() - convolved)

    @property
    def exceeding(self) -> float:
        """Return the share of the output channels in which the sum of two products can exceed 16 bits.

        Kernels add pairs of products of unsigned activations and signed weights in 16 bits where the processor has no
        VNNI; products of unsigned weights are added in 32 bits.
        """
        signed = [each.codes.reshape(len(each.codes), -1) for each in self.codes.values() if each.codes.min() < 0]
        if not signed:
            return 0.0
        pairs = [np.sort(np.abs(np.stack([rows.clip(min=0), rows.clip(max=0)])), axis=2)[..., -2:] for rows in signed]
        sums = np.concatenate([self.top * each.sum(2).max(0) for each in pairs])
        return float((sums > LARGEST).sum() / sum(len(each.codes) for each in self.codes.values()))

    def finished(self) -> Any:
        """Return the model with quantized weights as codes, after ONNX's checker has accepted it."""
        for name, each in self.codes.items():
            kind = np.dtype(np.uint8 if each.codes.min() >= 0 else np.int8)
            codes, zero = each.fitting(kind, level=self.top > 0)
            self.weights.pop(name)
            self._codes_of(name, codes.astype(kind), each.scale, zero)
        self.write()
        onnx.checker.check_model(self.model, full_check=True)
        return self.model

    def write(self) -> None:
        """Write the weights that nodes use into the model."""
        used = {name for node in self.proto.node for name in node.input}
        del self.proto.initializer[:]
        self.proto.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(value), name)
            for name, value in self.weights.items()
            if name in used
        )
        _sort(self.proto)


def _exported(network: nn.Module, images: Tensor, opset: int) -> bytes:
    buffer = BytesIO()
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT]}
    axes = {INPUT: {0: "n"}, OUTPUT: {0: "n"}}
    with warnings.catch_warnings():
        # The tracing exporter, which torch calls deprecated, keeps the weights' names and takes a tenth of the time.
        warnings.simplefilter("ignore")
        try:
            options = {"dynamo": False, "opset_version": opset, "do_constant_folding": False}
            torch.onnx.export(network, (images,), buffer, dynamic_axes=axes, **names, **options)  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"This network cannot be exported to ONNX with --opset {opset}: {reason(error).rstrip('.')}."
            ) from None
    return buffer.getvalue()


def _sort(graph: Any) -> None:
    """Sort the nodes such that each follows those whose outputs it reads."""
    waiting, ready, done = list(graph.node), {each.name for each in (*graph.initializer, *graph.input)}, []
    made = Counter(name for node in waiting for name in node.output)
    while waiting:
        first = [node for node in waiting if all(name in ready or name not in made for name in node.input)]
        ready |= {name for node in first for name in node.output}
        done += first
        kept = {id(node) for node in first}
        waiting = [node for node in waiting if id(node) not in kept]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in done]
    del graph.node[:]
    graph.node.extend(copies)
