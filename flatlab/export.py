"""Quantized networks written to a file: packed integer weights and their scales (exported.py reads them)."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flatlab import build, files
from flatlab.checkpoints import network as network_of
from flatlab.errors import UserError
from flatlab.models import Ensemble
from flatlab.quant.attach import Quantized, bake, quantized_layers, tensor_of
from flatlab.quant.codebook import decode
from flatlab.quant.packing import bits_of, pack
from flatlab.quantspecs import QuantSpec
from flatlab.runs import Run
from flatlab.specs import Place, RunSpec

FLOAT_BITS = 32


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        path: the file.
        bits: of a quantized weight.
        nominal: 32 / bits, the compression as QT-DoG prints it.
        bytes: of the file: packed weights, scales, what is not quantized, and the header.
        float_bytes: of all the network's tensors in float32; of an ensemble, all its members'.
        quantized_share: the share of its parameters that are quantized.
    """

    path: str
    bits: int
    nominal: float
    bytes: int
    float_bytes: int
    quantized_share: float

    @property
    def compression(self) -> float:
        """What the file saves in truth."""
        return self.float_bytes / self.bytes

    def facts(self) -> dict[str, Any]:
        """Return all numbers by name."""
        return {**asdict(self), "compression": self.compression}


def export(run: Run, path: Path, place: Place, *, checkpoint: str = "selected") -> Exported:
    """Write a run's quantized network with integer weights, of an ensemble each member's; `load_exported` reads it.

    Args:
        run: finished and quantized; of an ensemble's members, those that are not stay in float32.
        path: the file, .safetensors.
        place: data folder, device.
        checkpoint: "selected" or "last".

    Raises:
        UserError: where the run is not finished or nothing in it is quantized, or it is not wholly on its grid.
    """
    if not run.done:
        raise UserError(f"Run {run.spec.digest} is not finished: train it before it is exported.")
    network = network_of(run, checkpoint, place).cpu()
    if not quantized_layers(network):
        raise UserError(f"Run {run.spec.digest} ({run.spec.label}) is not quantized; export one that is, such as lsq.")
    return write(network, run.spec, path, place)


def write(network: nn.Module, spec: RunSpec, path: str | Path, place: Place) -> Exported:
    """Bake a network, quantized or not, and write it to a file, quantized weights packed.

    Args:
        network: on the host.
        spec: of its run.
        path: the file, .safetensors.
        place: data folder.

    Raises:
        UserError: where it is not wholly on its grid.
    """
    layers, path = quantized_layers(network).values(), Path(path)
    bits = max((bits_of(*layer.quantizer.levels) for layer in layers), default=FLOAT_BITS)
    inside = sum(layer.weight.numel() for layer in layers)
    files.save_arrays(path, *_contents(network, spec, place))
    return Exported(
        path=str(path),
        bits=bits,
        nominal=FLOAT_BITS / bits,
        bytes=path.stat().st_size,
        float_bytes=sum(each.numel() for each in set(network.state_dict(keep_vars=True).values())) * FLOAT_BITS // 8,
        quantized_share=inside / sum(p.numel() for p in network.parameters()),
    )


def _contents(network: nn.Module, spec: RunSpec, place: Place) -> tuple[files.Arrays, dict[str, Any]]:
    """Bake a network; return its arrays, quantized ones packed, and what is needed to build it anew."""
    if isinstance(network, Ensemble):
        arrays: files.Arrays = {}
        members = []
        for index, (member, own) in enumerate(zip(network.members, spec.members, strict=True)):
            found, facts = _contents(member, own, place)
            arrays |= {f"{index}.{name}": array for name, array in found.items()}
            members.append(facts)
        return arrays, {"combine": network.combine, "members": members}
    tensors, grids = {}, {}
    for name, layer in quantized_layers(network).items():
        key = f"{name}.{tensor_of(layer.layer)}"
        tensors[f"{key}.codes"], grids[key] = _packed(key, layer)
        tensors[f"{key}.scale"] = layer.quantizer.scale.detach().numpy()
    bake(network)
    plain = {name: value.numpy() for name, value in network.state_dict().items() if name not in grids}
    return {**plain, **tensors}, {"network": _built(spec, place), "quantized": grids}


def _packed(name: str, layer: Quantized) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Return a layer's codes as bits, and what is needed to read them."""
    quantizer, (low, high) = layer.quantizer, layer.quantizer.levels
    codes = quantizer.codes(layer.latent)
    if not torch.equal(decode(codes, quantizer.scale.detach(), quantizer.grid), layer.weight):
        raise UserError(
            f"{name} is not wholly on its grid in this checkpoint: INQ has not come to its last stage there."
        )
    bits = bits_of(low, high)
    facts = {"shape": list(codes.shape), "low": low, "bits": bits, "grid": quantizer.grid}
    return pack(codes.numpy(), low, bits), facts


def _built(spec: RunSpec, place: Place) -> dict[str, Any]:
    """Return how the network is built before its weights are loaded."""
    data, quantizer = build.domains(spec, place).data, spec.quantizer
    facts = {"name": spec.model, "num_classes": len(data.classes), "in_channels": data.domains[0].images.shape[1]}
    if isinstance(quantizer, QuantSpec) and quantizer.activations != "none":
        facts["activations"] = {"bits": quantizer.activation_bits, "signed": quantizer.activations == "signed"}
    return facts
