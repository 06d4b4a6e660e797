"""Checkpoints of other code bases: read without executing code, renamed, and their values checked."""

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from flatlab.errors import UserError, reason

LOG = logging.getLogger("flatlab")
CONTAINERS = ("state_dict", "model_state_dict", "model_dict", "model", "net", "network")
AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema")  # used if the file has none of CONTAINERS
# DataParallel, torch.compile, AveragedModel, a trainer that holds a model
WRAPPERS = re.compile(r"(?:module|_orig_mod|algorithm|model|net|backbone|encoder|student|ema_model)\.")
# DomainBed holds each tensor twice: under `featurizer`, and in `network`, the Sequential of featurizer and classifier.
DOMAINBED_FEATURES = re.compile(r"(?:featurizer|network\.0)\.(?:network\.)?")
BACKBONE = re.compile(r"(?:(?:module|_orig_mod|model|net)\.)*(?:backbone|encoder|feature_extractor)\.")
HEAD = re.compile(r"(?:head|heads\.head|fc|classifier|classifier\.1|network\.1)\.(?=(?:weight|bias)$)")
DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")  # torchvision's files have norm.1 for norm1
COUNTER = "num_batches_tracked"  # BatchNorm's; older checkpoints lack it, and nothing here reads it
LATENT = ("parametrizations", "quan_w_fn")  # names of a quantized network's latent weights


def read_foreign(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint: .safetensors, or a file of torch.save that needs no pickled code.

    Raises:
        UserError: the file does not exist, contains no tensors, or can only be read by unpickling Python objects.
    """
    if not path.is_file():
        raise UserError(f'No file {path}; weights are "none", "imagenet", or the path of a .safetensors or .pth file')
    stored = _read(path)
    while inside := _container(stored, path):
        stored = inside
    tensors = {}
    if isinstance(stored, Mapping):
        tensors = {key: each for key, each in stored.items() if isinstance(key, str) and isinstance(each, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name; expected a state_dict, alone or under 'model_dict'")
    return tensors


def _read(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} cannot be read without unpickling Python objects, which runs code, so flatlab refuses; "
            f"if you trust the file, convert it once, with the key that its tensors lie under: "
            f"torch.save(torch.load({path.name!r}, weights_only=False)['model_dict'], '{path.stem}-tensors.pth')"
        ) from error
    except Exception as error:  # damaged files fail in many ways: RuntimeError, EOFError, KeyError, struct.error, ...
        raise UserError(f"{path} cannot be read as a checkpoint: {reason(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse an archive whose entries claim more bytes than the file has: torch would allocate them before it fails."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
    if claimed > path.stat().st_size:
        raise UserError(
            f"{path} cannot be read as a checkpoint: its entries claim {claimed:,} bytes, and the file has "
            f"{path.stat().st_size:,}"
        )


def _container(stored: object, path: Path) -> Mapping[object, object] | None:
    """Return the mapping below a key such as "state_dict" that holds the weights, or None if there is no such key."""
    if not isinstance(stored, Mapping):
        return None
    there = [key for key in (*CONTAINERS, *AVERAGES) if isinstance(stored.get(key), Mapping)]
    if there and there[0] in CONTAINERS and there[-1] in AVERAGES:
        LOG.warning("%s holds %s and %s: taking %s.", path, there[0], there[-1], there[0])
    return stored[there[0]] if there else None


def _readings(state: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """Yield mappings from the file's names to ours, the most likely first.

    They cover the names of torchvision, DomainBed, SWAD and timm, with any of the `WRAPPERS` as prefix, and our own.
    """
    keys = [key for key in state if not key.endswith("n_averaged")]  # AveragedModel's counter
    yield _ours({key: _unwrap(key) for key in keys})
    yield _ours({key: DENSE.sub(r"\1", key) for key in keys})  # torchvision's own, whose ViT begins with an `encoder.`
    beside = {key: BACKBONE.sub("features.", key, count=1) for key in keys if BACKBONE.match(key)}  # a head without
    yield {key: beside.get(key) or _rename(_unwrap(key), prefixed=True) for key in keys}
    yield {key: _rename(key, prefixed=False) for key in keys}  # timm's own, with a head
    parts = {key: key.split(".") for key in keys}
    shared = len(os.path.commonprefix(list(parts.values())))  # of any name, such as `resnet.`
    for depth in range(1, min([shared + 1, *map(len, parts.values())])):
        yield _ours({key: _unwrap(".".join(each[depth:])) for key, each in parts.items()})


def _ours(bare: Mapping[str, str]) -> dict[str, str]:
    # Only plain torchvision names leave the features without a prefix. MobileNet calls a part of its own `features`,
    # so the prefix alone cannot tell our names from torchvision's.
    prefixed = any(name.startswith("head.") or DOMAINBED_FEATURES.match(name) for name in bare.values())
    return {key: _rename(name, prefixed=prefixed) for key, name in bare.items()}


def _unwrap(key: str) -> str:
    while found := WRAPPERS.match(key):
        key = key[found.end() :]
    return key


def _rename(key: str, *, prefixed: bool) -> str:
    if found := HEAD.match(key):
        return "head." + key[found.end() :]
    if found := DOMAINBED_FEATURES.match(key):
        return "features." + key[found.end() :]
    return key if prefixed else "features." + key


def fitted(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, name: str, source: str, but: str | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a foreign checkpoint by our names, after their names, shapes and values are checked.

    Args:
        state: the file's tensors.
        expected: the network's state_dict.
        name: the network's name, for errors.
        source: the file's name, for errors.
        but: prefix of our names that are ignored in the file and in the network.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape, or its values are impossible; the first one is
            named.
    """
    if any(mark in key for key in state for mark in LATENT):
        raise UserError(f"{source} holds a quantized network's latent weights and step sizes; bake() it, then import.")
    wanted = {key: each for key, each in expected.items() if not (but and key.startswith(but))}
    faults: list[tuple[int, str]] = []  # with the number of names that fit
    for reading in _readings(state):
        named = {key: ours for key, ours in reading.items() if not (but and ours.startswith(but))}
        names = {key: ours for key, ours in named.items() if ours in wanted or not ours.endswith(COUNTER)}
        faults.append((len(wanted.keys() & names.values()), misfit(names, state, wanted)))
        if not faults[-1][1]:
            break
    else:
        _, nearest = max(faults, key=lambda each: each[0])
        raise UserError(f"{source} does not fit {name}, which has {len(wanted)} tensors: {nearest}.")
    found: dict[str, str] = {}
    for key, ours in names.items():
        if fault := impossible(state[key], ours):
            raise UserError(f"{source}: {key} {fault}.")
        first = state[found.setdefault(ours, key)]
        if first.dtype != state[key].dtype or not torch.equal(first, state[key]):
            raise UserError(f"{source} holds {found[ours]} and {key}, which differ and are both {name}'s {ours}.")
    return {ours: state[key] for ours, key in found.items()}


def misfit(names: Mapping[str, str], state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return a description of the tensors that do not fit, or an empty string."""
    given = set(names.values())
    missing = [
        f"{key}, shape {_shape(each)}" for key, each in wanted.items() if key not in given and COUNTER not in key
    ]
    strange = [f"{key}, shape {_shape(state[key])}" for key, ours in names.items() if ours not in wanted]
    other = [
        f"{key}, shape {_shape(state[key])} where {_shape(wanted[ours])} is expected"
        for key, ours in names.items()
        if ours in wanted and state[key].shape != wanted[ours].shape
    ]
    kinds = {"missing": missing, "unexpected": strange, "of another shape": other}
    return "; ".join(f"{len(found)} {kind} (first {found[0]})" for kind, found in kinds.items() if found)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def impossible(tensor: Tensor, name: str) -> str:
    """Return why a tensor with this name cannot have these values, or an empty string."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return "is not a dense tensor"
    if name.endswith(COUNTER):
        return "" if not tensor.is_complex() and bool((tensor >= 0).all()) else "is not a count"
    if not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')} values; floating-point ones are expected"
    values = tensor.float()
    if broken := int((~torch.isfinite(values)).sum()):
        return f"holds {broken:,} of {values.numel():,} values that are not finite"
    if name.endswith("running_var") and bool((values < 0).any()):
        return f"holds a variance below zero, {float(values.min()):.4g}"
    return ""
