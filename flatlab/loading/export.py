"""Packed integer files of a run's network: written and read."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flatlab import files
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.loading.checkpoint import network as network_of
from flatlab.models.foreign import COUNTER
from flatlab.models.networks import Ensemble, Network, build_network
from flatlab.quant.attach import Quantized, attach_activations, bake, quantized_layers, tensor_of
from flatlab.quant.codebook import BITS, decode
from flatlab.quant.codes import codes_of
from flatlab.quant.packing import bits_of, pack, unpack
from flatlab.specs.base import Spec
from flatlab.specs.methods import name_of
from flatlab.specs.quantizers import BothSpec, QuantSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import Run

Size = Annotated[int, Field(ge=1, le=2**31)]
Bits = Annotated[int, Field(ge=BITS[0], le=BITS[-1])]


class Grid(Spec):
    """How the codes of a quantized weight were written."""

    shape: Annotated[tuple[Size, ...], Field(min_length=2, max_length=5)]
    low: Annotated[int, Field(ge=-(2**15), le=0)]  # the lowest code
    bits: Bits
    grid: Literal["uniform", "power-of-two"]

    @property
    def high(self) -> int:
        """The highest code: on either grid as far from zero as the lowest, or one less; unsigned, all bits."""
        if self.low == 0:
            return (1 << self.bits) - 1
        return min(-self.low, (1 << self.bits - 1) - 1) if self.grid == "uniform" else -self.low


class ExportedActivations(Spec):
    """How the inputs of layers were quantized."""

    bits: Bits
    signed: bool
    signed_first: bool = False  # of the first layer, whatever the others are


class ExportedNetwork(Spec):
    """How a network is built before its weights are loaded: from nothing but its name and sizes."""

    later = ("config",)

    name: str
    num_classes: Size
    in_channels: Size
    config: str | None = None  # of a network that transformers saved, the text of config.json
    activations: ExportedActivations | None = None


class Export(Spec):
    """The description of a network in a file."""

    network: ExportedNetwork
    quantized: dict[str, Grid]


class JointExport(Spec):
    """The description of an ensemble in a file."""

    combine: Literal["logits", "probabilities"]
    members: Annotated[tuple["Export | JointExport", ...], Field(min_length=1)]


class Packed(NamedTuple):
    """A quantized weight of a file: integer codes, their scale, and the grid that they count on."""

    codes: Tensor
    scale: Tensor
    grid: str


def load_exported(path: str | Path) -> Network | Ensemble:
    """Return the baked network that `export` wrote, in eval mode, equal to the bit; or an ensemble of such.

    Nothing but the file itself is opened, and it is checked before the network is built.

    Args:
        path: the file.

    Raises:
        UserError: where it is missing, damaged, or no export.
    """
    path = Path(path)
    arrays, facts = opened(path)
    with _naming(path):
        return _rebuilt(arrays, facts).eval()


def opened(path: Path) -> tuple[files.Arrays, Export | JointExport]:
    """Return the arrays of an exported file, and what they are.

    Args:
        path: the file.

    Raises:
        UserError: where it is missing, damaged, or no export.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file; name one that `flatlab export RUN` has written.")
    arrays, facts = files.load_arrays(path)
    if not _marked(facts):
        raise UserError(f"{path} is no export of a quantized network; `flatlab export RUN` writes one.")
    with _naming(path):
        text = json.dumps(facts)
        found = JointExport.parse(text) if "members" in facts else Export.parse(text)
        _check(arrays, found)
    return arrays, found


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{path} is not a whole export: {error}") from None


def is_export(path: Path) -> bool:
    """Return whether a file is marked as an export; `opened` checks it."""
    try:
        with safe_open(path, framework="numpy") as file:
            note = json.loads(json.loads((file.metadata() or {})["flatlab"])["meta"])
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError):
        return False
    return _marked(note)


def _marked(facts: object) -> bool:
    return isinstance(facts, dict) and bool({"quantized", "members"} & facts.keys())


def packed(arrays: files.Arrays, facts: Export) -> dict[str, Packed]:
    """Return the quantized weights of a file, by name.

    Args:
        arrays: arrays of the file.
        facts: facts of the file.
    """
    found = {}
    for key, grid in facts.quantized.items():
        codes = unpack(arrays[f"{key}.codes"], math.prod(grid.shape), grid.low, grid.bits).reshape(grid.shape)
        found[key] = Packed(torch.from_numpy(codes), torch.from_numpy(arrays[f"{key}.scale"].copy()), grid.grid)
    return found


def _rebuilt(arrays: files.Arrays, facts: Export | JointExport) -> Network | Ensemble:
    if isinstance(facts, JointExport):
        parts = [_rebuilt(_below(index, arrays), own) for index, own in enumerate(facts.members)]
        return Ensemble(parts, combine=facts.combine)
    network = _skeleton(facts.network)
    weights = {key: decode(*each).numpy() for key, each in packed(arrays, facts).items()}
    loading_network.load(network, {**_plain(arrays, facts), **weights})
    bake(network)
    return network


def _skeleton(facts: ExportedNetwork) -> Network:
    own = facts.model_dump(include={"num_classes", "in_channels", "config"})
    network = build_network(facts.name, **own)
    if facts.activations:
        attach_activations(network, **facts.activations.model_dump(include={"bits", "signed", "signed_first"}))
    return network


def _plain(arrays: files.Arrays, facts: Export) -> files.Arrays:
    """Return the arrays that are not of a quantized weight."""
    inside = {f"{key}.{part}" for key in facts.quantized for part in ("codes", "scale")}
    return {name: array for name, array in arrays.items() if name not in inside}


def _below(index: int, arrays: files.Arrays) -> files.Arrays:
    prefix = f"{index}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


# --- what a file must be, before memory is taken for it ---


def _check(arrays: files.Arrays, facts: Export | JointExport) -> None:
    if isinstance(facts, JointExport):
        known = set(map(str, range(len(facts.members))))
        if strange := [name for name in arrays if name.partition(".")[0] not in known]:
            raise UserError(f"{strange[0]} belongs to none of its {len(known)} members.")
        for index, own in enumerate(facts.members):
            _check(_below(index, arrays), own)
        return
    with torch.device("meta"):
        expected = {name: each for name, each in _skeleton(facts.network).state_dict().items()}
    for key, grid in facts.quantized.items():
        _check_grid(key, grid, expected, arrays)
    plain = {name: each for name, each in expected.items() if name not in facts.quantized}
    given = _plain(arrays, facts)
    if odd := sorted(plain.keys() ^ given.keys()):
        raise UserError(f"{odd[0]} is {'missing' if odd[0] in plain else 'not one of its tensors'}.")
    for name, tensor in plain.items():
        _check_array(name, given[name], tuple(tensor.shape), tensor.dtype)


def _check_grid(key: str, grid: Grid, expected: Mapping[str, Tensor], arrays: files.Arrays) -> None:
    """Refuse codes or step sizes that are not as their grid says, or are of no weight."""
    if key not in expected or tuple(expected[key].shape) != grid.shape:
        wanted = f"has the shape {tuple(expected[key].shape)}" if key in expected else "is not one of its tensors"
        raise UserError(f"{key} {wanted}, and codes of the shape {grid.shape} are given.")
    lows = (
        (0, -(2 ** (grid.bits - 1)), 1 - 2 ** (grid.bits - 1)) if grid.grid == "uniform" else (-(2 ** (grid.bits - 2)),)
    )
    if grid.low not in lows:
        raise UserError(
            f"{key} has {grid.bits} bits, whose lowest code must be {' or '.join(map(str, lows))}, not {grid.low}."
        )
    for part in ("codes", "scale"):
        if f"{key}.{part}" not in arrays:
            raise UserError(f"{key}.{part} is missing.")
    stream, count = arrays[f"{key}.codes"], math.prod(grid.shape)
    if stream.dtype != np.uint8 or stream.shape != (-(-count * grid.bits // 8),):
        raise UserError(
            f"{key}.codes must be {-(-count * grid.bits // 8):,} bytes, {count:,} codes of {grid.bits} bits."
        )
    if int(unpack(stream, count, grid.low, grid.bits).max()) > grid.high:
        raise UserError(f"{key}.codes must lie between {grid.low} and {grid.high}.")
    scale = arrays[f"{key}.scale"]
    shapes = [(), *(tuple(n if i == axis else 1 for i, n in enumerate(grid.shape)) for axis in (0, 1))]
    if scale.dtype != np.float32 or scale.shape not in shapes:
        raise UserError(f"{key}.scale must be one float32 number, or one for each output channel.")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise UserError(f"{key}.scale must be finite and above zero.")


def _check_array(name: str, array: np.ndarray[Any, Any], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    wanted = str(dtype).removeprefix("torch.")
    if (array.shape, array.dtype.name) != (shape, wanted):
        raise UserError(f"{name} is {array.dtype.name} of the shape {array.shape}; {wanted} of {shape} is expected.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{name} holds values that are not finite.")
    if name.endswith(("running_var", COUNTER)) and (array < 0).any():
        raise UserError(f"{name} holds values below zero.")
    if name.endswith("activations.scale") and not (array > 0).all():
        raise UserError(f"{name} must be above zero.")


FLOAT_BITS = 32


@dataclass(frozen=True)
class Exported:
    """The sizes of an exported network.

    Attributes:
        path: the file.
        bits: bits of a quantized weight.
        nominal: 32 / bits, the compression as QT-DoG prints it.
        bytes: size of the file: packed weights, scales, what is not quantized, and the header.
        float_bytes: size of all the network's tensors in float32; for an ensemble, of all its members'.
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
        """The actual compression: bytes in float32 over bytes of the file."""
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
    if path.suffix.lower() == ".onnx":
        raise UserError(
            f"export_run writes packed integers to a .safetensors file, got {path}: an ONNX file is written by"
            " `flatlab export RUN --format onnx`."
        )
    run.require_done()
    network = network_of(run, checkpoint, place).cpu()
    if not quantized_layers(network):
        name = name_of(run.spec)
        raise UserError(f"Run {run.spec.digest} ({name}) is not quantized; export one that is, such as of QT-DoG.")
    return write(network, run.spec, path, place)


def write(network: nn.Module, spec: RunSpec, path: str | Path, place: Place) -> Exported:
    """Bake a network, quantized or not, and write it to a file, quantized weights packed.

    Args:
        network: on the host.
        spec: spec of its run.
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
    """Bake a network; return its arrays, quantized ones packed, and the description needed to rebuild it."""
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
    codes = codes_of(name, layer)
    bits = bits_of(low, high)
    facts = {"shape": list(codes.shape), "low": low, "bits": bits, "grid": quantizer.grid}
    return pack(codes.numpy(), low, bits), facts


def _built(spec: RunSpec, place: Place) -> dict[str, Any]:
    """Return how the network is built before its weights are loaded."""
    data, quantizer = loading_data.domains(spec, place).data, spec.quantizer
    facts: dict[str, Any] = {
        "name": spec.model,
        "num_classes": len(data.classes),
        "in_channels": data.domains[0].images.shape[1],
    }
    if config := loading_network.config_of(spec.model, place):
        facts["config"] = config
    if isinstance(quantizer, QuantSpec) and quantizer.activations != "none":
        facts["activations"] = {"bits": quantizer.activation_bits, "signed": quantizer.activations == "signed"}
        if isinstance(quantizer, BothSpec):
            facts["activations"]["signed_first"] = True
    return facts
