"""Files that are whole or absent: atomic writes, tensors that carry their own hash. No torch, no pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flatlab.errors import UserError
from flatlab.jsontext import strict_json

Arrays = dict[str, np.ndarray[Any, Any]]


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: to a neighbour first, then by rename."""
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(neighbour, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(neighbour, path)
    except OSError:
        neighbour.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    write_bytes(path, (strict_json(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.

    Raises:
        UserError: where the file holds none; names it.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object. `flatlab runs verify` says what else is.")
    return value


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], meta: Any = None) -> None:
    """Write named arrays and a JSON value as safetensors, with a hash over both in the header."""
    whole = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    note = json.dumps(meta, sort_keys=True)
    header = {"flatlab": json.dumps({"sha256": _content_hash(whole, note), "meta": note})}
    write_bytes(path, save(whole, metadata=header))


def load_arrays(path: Path) -> tuple[Arrays, Any]:
    """Read what `save_arrays` wrote and check its hash.

    Args:
        path: the file.

    Raises:
        UserError: where the file is missing, truncated or altered; names it.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; `flatlab runs verify` says what else is.")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            header = json.loads((file.metadata() or {})["flatlab"])
        intact = header["sha256"] == _content_hash(arrays, header["meta"])
        meta = json.loads(header["meta"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise UserError(
            f"{path} is damaged: its content does not match its own hash. Delete it, and the `done` of its run or "
            "measurement where there is one, and repeat the command: what was in it is then made anew."
        )
    return arrays, meta


def _content_hash(arrays: Mapping[str, np.ndarray[Any, Any]], note: str) -> str:
    digest = hashlib.sha256(note.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
