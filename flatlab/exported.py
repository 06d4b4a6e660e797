"""Exported files read: to the baked network, equal to the bit, or to the codes that were written."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flatlab import build, files
from flatlab.errors import UserError
from flatlab.models import Ensemble, Network, build_network
from flatlab.quant.attach import attach_activations, bake
from flatlab.quant.codebook import decode
from flatlab.quant.packing import unpack

_MARKS = {"quantized", "members"}  # of which an export's facts have one


class Packed(NamedTuple):
    """A quantized weight of a file: integer codes, their scale, and the grid that they count on."""

    codes: Tensor
    scale: Tensor
    grid: str


def load_exported(path: str | Path) -> Network | Ensemble:
    """Return the baked network that `export` wrote, in eval mode, equal to the bit; or an ensemble of such.

    Args:
        path: the file.

    Raises:
        UserError: where it is missing, damaged, or no export.
    """
    return _built(*opened(Path(path))).eval()


def opened(path: Path) -> tuple[files.Arrays, dict[str, Any]]:
    """Return the arrays of an exported file, and what they are.

    Args:
        path: the file.

    Raises:
        UserError: where it is missing, damaged, or no export.
    """
    arrays, facts = files.load_arrays(path)
    if not isinstance(facts, dict) or not facts.keys() & _MARKS:
        raise UserError(f"{path} is no export of a quantized network; `flatlab export RUN` writes one.")
    return arrays, facts


def is_export(path: Path) -> bool:
    """Return whether a file says that it is an export; whether it is whole, `opened` says."""
    try:
        with safe_open(path, framework="numpy") as file:
            note = json.loads((file.metadata() or {})["flatlab"])["meta"]
    except (SafetensorError, KeyError, ValueError):
        return False
    return bool(_MARKS & json.loads(note).keys())


def packed(arrays: files.Arrays, facts: dict[str, Any]) -> dict[str, Packed]:
    """Return the quantized weights of a file, by name.

    Args:
        arrays: of the file.
        facts: of the file.
    """
    found = {}
    for key, grid in facts["quantized"].items():
        shape = tuple(grid["shape"])
        codes = unpack(arrays[f"{key}.codes"], int(np.prod(shape)), grid["low"], grid["bits"]).reshape(shape)
        found[key] = Packed(torch.from_numpy(codes), torch.from_numpy(arrays[f"{key}.scale"].copy()), grid["grid"])
    return found


def _built(arrays: files.Arrays, facts: dict[str, Any]) -> Network | Ensemble:
    if "members" in facts:
        return Ensemble(
            [_built(_below(index, arrays), own) for index, own in enumerate(facts["members"])],
            combine=facts["combine"],
        )
    weights = {key: decode(*each).numpy() for key, each in packed(arrays, facts).items()}
    plain = {name: array for name, array in arrays.items() if name.rpartition(".")[0] not in weights}
    built = {**facts["network"]}
    activations = built.pop("activations", None)
    network = build_network(built.pop("name"), **built)
    if activations:
        attach_activations(network, **activations)
    build.load(network, {**plain, **weights})
    bake(network)
    return network


def _below(index: int, arrays: files.Arrays) -> files.Arrays:
    prefix = f"{index}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
