"""An entry of the store: a directory named by the digest of its spec, complete once it contains `done`.

`done` lists the hash of every file of the result; provenance (machine facts, seconds) and state are excluded.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from flatlab import files
from flatlab.errors import UserError
from flatlab.files import Arrays
from flatlab.specs.base import Spec

_NAME = re.compile("[0-9a-f]{16}")  # of an entry's folder
_UNCOUNTED = ("state", "kept", "measurements", "provenance.json", "done", ".lock")  # not part of the result


class Entry:
    """A directory with a spec, files, and a file `done` that is written last."""

    parse: Callable[[str], Spec]  # reads its spec from JSON
    depth = 1  # number of folders below that of the store

    def __init__(self, path: Path, spec: Spec) -> None:
        self.path, self.spec = path, spec

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the entry in a folder.

        Args:
            folder: contains a spec.json.

        Raises:
            UserError: if spec.json is damaged; names the file.
        """
        path = folder / "spec.json"
        try:
            spec = cls.parse(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error} Delete its folder, and repeat the command.") from None
        if spec.digest != folder.name:
            raise UserError(f"{path} is damaged: it is not the spec of {folder.name}. Delete its folder.")
        return cls(folder, spec)

    @property
    def done(self) -> bool:
        """Whether the entry is finished."""
        return os.path.exists(os.path.join(self.path, "done"))  # a Path costs ten times as much

    def create(self) -> None:
        """Create the directory and its spec.json if they are missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "spec.json").exists():
            files.write_bytes(self.path / "spec.json", self.spec.canonical().encode() + b"\n")

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Try to lock the entry; yields whether it succeeded. The kernel releases the lock of a killed process.

        Leftovers of killed processes are not removed here, since others may be writing units and notes (leftovers.py).

        Raises:
            UserError: if the entry lies behind a symbolic link.
        """
        for folder in [self.path, *self.path.parents][: self.depth]:
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link, and nothing is written behind one: replace it by the folder, or "
                    "give the folder's own location as --store."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            self.create()
            yield True
        finally:
            lock.release()

    def finish(self) -> None:
        """Write `done` with the hash of every file of the result."""
        hashes = {name: files.file_hash(self.path / name) for name in self.files()}
        files.write_record(self.path / "done", {"files": hashes})

    def files(self) -> list[str]:
        """Return the names of the files of the result, sorted."""
        return sorted(
            str(path.relative_to(self.path))
            for path in self.path.rglob("*")
            if path.is_file() and path.name[0] != "." and path.relative_to(self.path).parts[0] not in _UNCOUNTED
        )

    @classmethod
    def inspect(cls, folder: Path) -> list[str]:
        """Check spec, files and `done` of the entry in a folder against their hashes and each other.

        Args:
            folder: folder of an entry, damaged or not.

        Returns:
            A sentence for each fault.
        """
        if not (folder / "spec.json").exists():
            return [f"{folder} has no spec.json, so it is not a run or measurement: delete the folder."]
        return complaints(partial(cls.read, folder)) + cls(folder, Spec()).faults()

    def faults(self) -> list[str]:
        """Check the files against the hashes in `done`, and those not listed there (states, kept) against their own.

        Returns:
            A sentence for each fault; the spec, which is verified by its digest, is checked by `read`.
        """
        expected: dict[str, str] = {}
        faults = complaints(lambda: expected.update(self.hashes()), lambda: self.provenance)
        loose = [*self.path.glob("*.safetensors"), *self.path.glob("*/*.safetensors"), *self.path.glob("log.jsonl")]
        present = {*self.files(), *(str(path.relative_to(self.path)) for path in loose)} - {"spec.json"}
        lacking = set(expected) - present - {"spec.json"}
        lacking |= {"provenance.json"} if self.done and not (self.path / "provenance.json").exists() else set()
        faults += [f"{self.path / name} is missing." for name in sorted(lacking)]
        for name in sorted(present):
            faults += _fault(self.path / name, expected.get(name))
        for name in sorted({*self.files()} - {*expected, "spec.json"}) if expected else []:
            faults.append(f"{self.path / name} is not listed in `done`, so it cannot be verified. Move it away.")
        return faults

    def hashes(self) -> dict[str, str]:
        """Return the hashes in `done`; empty if the entry is not finished."""
        if not self.done:
            return {}
        hashes = files.read_record(self.path / "done").get("files")
        if not isinstance(hashes, dict) or not hashes:
            raise UserError(f"{self.path / 'done'} is damaged: it lists no files.")
        return hashes

    def arrays(self, path: Path) -> tuple[Arrays, Any]:
        """Return the arrays and the JSON value of a file of this entry.

        Raises:
            UserError: if the file is damaged or another's, or was replaced after the entry was finished.
        """
        found = files.load_arrays(path)
        self.require_recorded(path)
        return found

    def require_recorded(self, path: Path) -> None:
        """Refuse a file that differs from what `done` lists.

        Not listed are states, and checkpoints kept along a trajectory, which may lie in the folder of another run.

        Raises:
            UserError: if its hash is another.
        """
        if not path.is_relative_to(self.path):
            return
        expected = self.hashes().get(path.relative_to(self.path).as_posix())
        if expected is not None and not (path.exists() and files.file_hash(path) == expected):
            raise UserError(
                f"{path} is damaged: its hash is not the recorded one. Remove that run, or restore the file."
            )

    @property
    def provenance(self) -> dict[str, Any]:
        """Machine facts and seconds; empty before anything has run."""
        path = self.path / "provenance.json"
        return files.read_record(path) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add machine facts to provenance.json, under a lock, since other processes may be adding theirs."""
        self.add_note(lambda _: facts)

    def add_note(self, facts: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Add to provenance.json the result of a function of its present content, under a lock."""
        with FileLock(self.path / ".note.lock"):
            known = self.provenance
            files.write_record(self.path / "provenance.json", {**known, **facts(known)})


def discard(folder: Path) -> None:
    """Delete a folder, but nothing behind a symbolic link; another process may be deleting it at the same time."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def holds_entry(folder: Path) -> bool:
    """Whether a folder is that of an entry, damaged or not; a folder with nothing but a lock is not."""
    if not folder.is_dir():
        return False
    named = _NAME.fullmatch(folder.name) is not None
    return (folder / "spec.json").exists() or (named and any(path.name[0] != "." for path in folder.iterdir()))


def complaints(*acts: Callable[[], Any]) -> list[str]:
    """Call functions, and return the messages of the user errors raised."""
    found = []
    for act in acts:
        try:
            act()
        except UserError as error:
            found.append(str(error))
    return found


def _fault(path: Path, expected: str | None) -> list[str]:
    """Read a file according to its type, and check it against its hash in `done`."""
    readers: dict[str, Callable[[Path], Any]] = {".safetensors": files.load_arrays, ".jsonl": files.read_rows}
    own = complaints(partial(readers[path.suffix], path)) if path.suffix in readers else []
    if own or expected in (None, files.file_hash(path)):
        return own
    return [f"{path} is damaged: its hash is not the recorded one."]
