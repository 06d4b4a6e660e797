"""Results as files: one .npz that NumPy alone reads, with class and version in its head; no pickle."""

import io
import json
import zipfile
import zlib
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import flatlab
from flatlab import files
from flatlab.errors import UserError

FORMAT = 1  # of the head; a file of a later one is refused
HEAD = "flatlab"  # the array that holds it, as JSON
DAMAGED = "is damaged: make the result again, or restore it from a copy."
_ROOM = "results"  # below which classes of results lie
_Arrays = dict[str, npt.NDArray[Any]]


class Saved:
    """A dataclass kept as a file: its fields are arrays, numbers, names, and tuples, dicts and records of them."""

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to a file, atomically; `flatlab.load` reads it.

        The file is an .npz archive, whatever its name: `numpy.load` gives its arrays under the names of the fields. It
        has a hash of them all.

        Raises:
            UserError: if there is no such folder, or `path` is one.
        """
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path} must be the path of a file in a folder that exists.")
        arrays: _Arrays = {}
        head = {"format": FORMAT, "version": flatlab.__version__, "result": _encode(self, "", arrays)}
        head["sha256"] = files.content_hash(head["result"], arrays)
        with io.BytesIO() as buffer:
            whole: Any = {HEAD: np.array(json.dumps(head)), **arrays}
            np.savez_compressed(buffer, **whole)
            files.write_bytes(Path(path), buffer.getvalue())


def load(path: str | PathLike[str]) -> Any:
    """Return the result that `result.save(path)` wrote, of the same class; its tensors on the CPU.

    Args:
        path: of the file.

    Raises:
        UserError: where there is no such file, or it is of another kind, damaged, or of a later version.
    """
    head, arrays = _read(Path(path))
    if head["format"] == FORMAT and head.get("sha256") != files.content_hash(head["result"], arrays):
        raise UserError(f"{path} {DAMAGED}")
    if not isinstance(head["format"], int) or not isinstance(head["result"], dict) or "class" not in head["result"]:
        raise UserError(f"{path} {DAMAGED}")
    if head["format"] > FORMAT:
        raise UserError(
            f"{path} is of format {head['format']} (flatlab {head['version']}), and flatlab {flatlab.__version__} "
            f"reads up to format {FORMAT}: install flatlab {head['version']} or later."
        )
    try:
        return _decode(head["result"], arrays)
    except _UnknownError as error:
        raise UserError(
            f"{path} was written by flatlab {head['version']} and holds {error}, which flatlab {flatlab.__version__} "
            f"does not know: install flatlab {head['version']}."
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError):  # a head that was edited, or lacks arrays
        raise UserError(f"{path} {DAMAGED}") from None


class _UnknownError(Exception):
    """A class, or fields of one, that this version lacks."""


def _read(path: Path) -> tuple[dict[str, Any], _Arrays]:
    """Return the head and the arrays of a file."""
    if not path.is_file():
        raise UserError(f"{path} must be a file that `result.save(path)` wrote, but does not exist.")
    head: Any = None
    arrays: _Arrays = {}
    with path.open("rb") as file:
        if file.peek(2)[:2] == b"PK":  # an archive, whole or not
            try:
                with np.load(file, allow_pickle=False) as content:
                    if HEAD in content:
                        arrays = {name: content[name] for name in content}
                        head = json.loads(arrays.pop(HEAD).item())
            except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError):
                raise UserError(f"{path} {DAMAGED}") from None
    if not (isinstance(head, dict) and head.keys() >= {"format", "version", "result"}):
        raise UserError(f"{path} must be a file that `result.save(path)` wrote, but is of another kind.")
    return head, arrays


def _encode(value: Any, name: str, arrays: _Arrays) -> Any:
    """Return a value as JSON; its arrays are entered under dotted names."""

    def inside(key: Any, each: Any) -> Any:
        return _encode(each, f"{name}.{key}".lstrip("."), arrays)

    if value is None or isinstance(value, bool | int | float | str) and not isinstance(value, np.generic):
        return value
    if is_dataclass(value):
        kind = f"{type(value).__module__.removeprefix('flatlab.')}.{type(value).__name__}"
        named = {each.name: getattr(value, each.name) for each in fields(value)}
        return {"class": kind, "fields": {key: inside(key, each) for key, each in named.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [inside(index, each) for index, each in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": [[_encode(key, "", {}), inside(index, value[key])] for index, key in enumerate(value)]}
    kind = "scalar" if isinstance(value, np.generic) else "tensor" if hasattr(value, "detach") else "array"
    arrays[name] = value.detach().cpu().numpy() if kind == "tensor" else np.asarray(value)
    return {kind: name}


def _decode(value: Any, arrays: _Arrays) -> Any:
    """Return what `_encode` was given."""
    if not isinstance(value, dict):
        return value
    if "class" in value:
        return _built(value["class"], {name: _decode(each, arrays) for name, each in value["fields"].items()})
    ((kind, content),) = value.items()
    if kind in ("array", "scalar"):
        return arrays[content] if kind == "array" else arrays[content][()]
    if kind == "tensor":
        return import_module("torch").from_numpy(arrays[content])
    if kind == "dict":
        return {_decode(key, arrays): _decode(each, arrays) for key, each in content}
    whole = [_decode(each, arrays) for each in content]
    return tuple(whole) if kind == "tuple" else whole


def _built(kind: str, given: dict[str, Any]) -> Any:
    """Return an object of a class below `flatlab`, from the fields that it has in a file."""
    module, _, name = kind.rpartition(".")
    known = module.partition(".")[0] == _ROOM and find_spec(f"flatlab.{module}")
    found = getattr(import_module(f"flatlab.{module}"), name, None) if known else None
    if not (isinstance(found, type) and is_dataclass(found)):
        raise _UnknownError(f"a {name}")
    own = {each.name: each.default is MISSING for each in fields(found)}
    if more := sorted({*given} - {*own} | {each for each, needed in own.items() if needed and each not in given}):
        raise _UnknownError(f"a {name} with other fields ({', '.join(more)})")
    return found(**given)
