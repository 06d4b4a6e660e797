"""Atomic writes, arrays with a hash, strict JSON."""

import hashlib
import json
import math
import os
import platform
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from flatlab.errors import UserError


def strict_json(value: Any, **style: Any) -> str:
    """Return JSON that any reader accepts: non-finite numbers become null."""
    return json.dumps(_finite(value), sort_keys=True, allow_nan=False, **style)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if sys.platform != "win32":
    import fcntl

Arrays = dict[str, np.ndarray[Any, Any]]
HOST = platform.node()
SCRATCH, HELD = "flatlab-", ".flatlab.lock"  # a folder for temporary files: prefix of its name, and its lock file
LONGEST_PAUSE = 2.0  # seconds between two readings of the disk, if nothing changes
_DIGEST = "[0-9a-f]{16}"  # below: the files of a store (runs.py); an export that is written there has no owner
_IN_STORE = re.compile(
    rf"(?:.*?/)?({_DIGEST}/(?:(?:checkpoints|state|kept|measurements/{_DIGEST})/[^/]+|[a-z]+\.jsonl?|done))"
)
_REMEDY = (
    "Delete it, and the `done` of its run or measurement if there is one, and repeat the command, which then creates "
    "it again."
)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary file in the same folder first, then by rename."""
    with aside(path) as neighbour, open(neighbour, "xb") as file:
        _hold(file)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, renamed to `path` on success and removed on failure."""
    # Process ids repeat between nodes and containers, tokens do not.
    neighbour = path.with_name(f".{path.name}.{HOST}.{secrets.token_hex(8)}.tmp")
    try:
        yield neighbour
        os.replace(neighbour, path)
    except BaseException as error:
        neighbour.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the path that was given
        raise


def _hold(file: IO[bytes]) -> None:
    """Lock a file until it is closed, so that `free` returns False meanwhile."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def free(path: Path) -> bool:
    """Whether no process holds a temporary file; on systems without such locks it counts as held."""
    if sys.platform == "win32":
        return False
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, gone, or another user's
        return False
    return True


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder for temporary files, locked while the block runs, so that those of killed processes are known."""
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, FileLock(Path(folder) / HELD):
        yield Path(folder)


def pauses(first: float) -> Iterator[float]:
    """Yield the seconds to wait between readings of the disk: each twice the last, up to `LONGEST_PAUSE`."""
    while True:
        yield first
        first = min(2 * first, LONGEST_PAUSE)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, atomically."""
    write_bytes(path, (strict_json(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: if the file contains none; names the file.
    """
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it contains no JSON object. `flatlab runs verify` lists all damage.")
    return value


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its owner and a hash over both."""
    write_json(path, {**value, "seal": _seal(path, strict_json(value))})


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote, and check its hash and its owner.

    Raises:
        UserError: if the file is altered, or belongs to another owner; names the file.
    """
    record = read_json(path)
    seal = record.pop("seal", None)
    _check_seal(path, strict_json(record), seal)
    return record


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON objects, one a line; the last line has their owner and a hash over all."""
    text = "".join(strict_json(row) + "\n" for row in rows)
    write_bytes(path, f"{text}{strict_json({'seal': _seal(path, text)})}\n".encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote, and check its hash and its owner.

    Raises:
        UserError: if the file is altered, or belongs to another owner; names the file.
    """
    try:
        *lines, last = path.read_text().splitlines(keepends=True)
        rows, seal = [from_json(line) for line in lines], json.loads(last)["seal"]  # a third of the time of `json`
    except (ValueError, KeyError, TypeError):
        lines, rows, seal = [], [], None
    _check_seal(path, "".join(lines), seal)
    return rows


def _seal(path: Path, text: str) -> dict[str, str]:
    owner = owner_of(path)
    return {"owner": owner, "sha256": hashlib.sha256(f"{owner}\n{text}".encode()).hexdigest()}


def _check_seal(path: Path, text: str, seal: Any) -> None:
    if not isinstance(seal, dict) or seal.keys() != {"owner", "sha256"}:
        seal = {"owner": "", "sha256": ""}
    if seal["sha256"] != hashlib.sha256(f"{seal['owner']}\n{text}".encode()).hexdigest():
        raise UserError(f"{path} is damaged: its content does not match its hash. {_REMEDY}")
    check_owner(path, seal["owner"])


def owner_of(path: Path) -> str:
    """Return a file's path from its run's digest on; an empty string for a file outside a store."""
    found = _IN_STORE.fullmatch(path.absolute().as_posix())
    return found[1] if found else ""


def check_owner(path: Path, found: str) -> None:
    """Refuse an intact file that belongs to another owner.

    Args:
        path: the file.
        found: the owner recorded in it.

    Raises:
        UserError: if the owners differ; names the file and both owners.
    """
    if found != owner_of(path):
        raise UserError(
            f"{path} belongs to another run or measurement: it was written as {found or 'a file outside a store'}, and "
            f"must be {owner_of(path) or 'a file outside a store'}. Restore the right file. Or: {_REMEDY}"
        )


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]], meta: Any = None) -> None:
    """Write named arrays and a JSON value as safetensors, with the owner and a hash over all in the header."""
    whole = {name: np.asarray(array, order="C") for name, array in sorted(arrays.items())}
    header = {"owner": owner_of(path), "meta": json.dumps(meta, sort_keys=True)}
    header["sha256"] = content_hash([header["owner"], header["meta"]], whole)
    write_bytes(path, save(whole, metadata={"flatlab": json.dumps(header)}))


def load_arrays(path: Path) -> tuple[Arrays, Any]:
    """Read what `save_arrays` wrote, and check its hash and its owner.

    Raises:
        UserError: if the file is missing, truncated, altered, or belongs to another owner; names the file.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; `flatlab runs verify` lists all that is missing.")
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            header = json.loads((file.metadata() or {})["flatlab"])
        intact = header["sha256"] == content_hash([header["owner"], header["meta"]], arrays)
        meta = json.loads(header["meta"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its content does not match its hash. {_REMEDY}")
    check_owner(path, header["owner"])
    return arrays, meta


def content_hash(facts: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Return the SHA-256 of a JSON value, and of arrays with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
