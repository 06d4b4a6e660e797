"""A quantized network as a file: packed integer weights and their scales, which load back to the baked network."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatlab import build, files
from flatlab.checkpoints import network as network_of
from flatlab.errors import UserError
from flatlab.models import Network, build_network
from flatlab.quant.attach import Quantized, attach_activations, bake, quantized_layers, tensor_of
from flatlab.quant.codebook import decode
from flatlab.quant.packing import bits_of, pack, unpack
from flatlab.quantspecs import QuantSpec
from flatlab.runs import Run
from flatlab.specs import Place

FLOAT_BITS = 32


@dataclass(frozen=True)
class Exported:
    """What an export came to.

    Attributes:
        path: the file.
        bits: of a quantized weight.
        nominal: 32 / bits, the compression as QT-DoG prints it.
        bytes: of the file: packed weights, scales, what is not quantized, and the header.
        float_bytes: of all the network's tensors in float32.
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
    """Write a run's quantized network with integer weights; `load_exported` reads it.

    Args:
        run: finished and quantized.
        path: the file, .safetensors.
        place: data folder, device.
        checkpoint: "selected" or "last".

    Raises:
        UserError: where the run is not finished, not quantized or an ensemble, or not wholly on its grid.
    """
    if not run.done:
        raise UserError(f"Run {run.spec.digest} is not finished: train it before it is exported.")
    if run.spec.members:
        raise UserError(f"Run {run.spec.digest} is an ensemble; export its members, each on its own.")
    if run.spec.quantizer is None:
        raise UserError(f"Run {run.spec.digest} ({run.spec.label}) is not quantized; export one that is, such as lsq.")
    network = network_of(run, checkpoint, place).cpu()
    tensors, grids = {}, {}
    for name, layer in quantized_layers(network).items():
        key = f"{name}.{tensor_of(layer.layer)}"
        tensors[f"{key}.codes"], grids[key] = _packed(key, layer)
        tensors[f"{key}.scale"] = layer.quantizer.scale.detach().numpy()
    bake(network)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    plain = {name: value for name, value in state.items() if name not in grids}
    files.save_arrays(path, {**plain, **tensors}, {"network": _built(run, place), "quantized": grids})
    inside = sum(state[key].size for key in grids)
    bits = max(grid["bits"] for grid in grids.values())
    return Exported(
        path=str(path),
        bits=bits,
        nominal=FLOAT_BITS / bits,
        bytes=path.stat().st_size,
        float_bytes=sum(value.size for value in state.values()) * FLOAT_BITS // 8,
        quantized_share=inside / sum(p.numel() for p in network.parameters()),
    )


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


def _built(run: Run, place: Place) -> dict[str, Any]:
    """Return how the network is built before its weights are loaded."""
    data, quantizer = build.domains(run.spec, place).data, run.spec.quantizer
    facts = {"name": run.spec.model, "num_classes": len(data.classes), "in_channels": data.domains[0].images.shape[1]}
    if isinstance(quantizer, QuantSpec) and quantizer.activations != "none":
        facts["activations"] = {"bits": quantizer.activation_bits, "signed": quantizer.activations == "signed"}
    return facts


def load_exported(path: str | Path) -> Network:
    """Return the baked network that `export` wrote, in eval mode, equal to the bit.

    Args:
        path: the file.

    Raises:
        UserError: where it is missing, damaged, or no export.
    """
    arrays, facts = files.load_arrays(Path(path))
    if not isinstance(facts, dict) or "quantized" not in facts:
        raise UserError(f"{path} is no export of a quantized network; `flatlab export RUN` writes one.")
    for key, grid in facts["quantized"].items():
        shape = tuple(grid["shape"])
        codes = unpack(arrays.pop(f"{key}.codes"), int(np.prod(shape)), grid["low"], grid["bits"]).reshape(shape)
        scale = torch.from_numpy(arrays.pop(f"{key}.scale"))
        arrays[key] = decode(torch.from_numpy(codes), scale, grid["grid"]).numpy()
    built = {**facts["network"]}
    activations = built.pop("activations", None)
    network = build_network(built.pop("name"), **built)
    if activations:
        attach_activations(network, **activations)
    build.load(network, arrays)
    bake(network)
    return network.eval()
