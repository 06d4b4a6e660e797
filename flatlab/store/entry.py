"""An entry of the store: a directory named by the digest of its spec, whole once `done` is there.

`done` lists the hash of every file that counts; provenance (machine facts, seconds) and state are outside it.
"""

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
from flatlab.specs.base import Spec

_NAME = re.compile("[0-9a-f]{16}")  # of an entry's folder
_UNCOUNTED = ("state", "kept", "measurements", "provenance.json", "done", ".lock")  # outside the compared bytes


class Entry:
    """A directory with a spec, files, and a `done` that is written last."""

    parse: Callable[[str], Spec]  # its spec, from JSON
    depth = 1  # folders from the store's on

    def __init__(self, path: Path, spec: Spec) -> None:
        self.path, self.spec = path, spec

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the entry in a folder.

        Args:
            folder: with a spec.json.

        Raises:
            UserError: where that is damaged; names it.
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
        return (self.path / "done").exists()

    def create(self) -> None:
        """Make the directory and its spec.json, where they are absent."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "spec.json").exists():
            files.write_bytes(self.path / "spec.json", self.spec.canonical().encode() + b"\n")

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Try to lock the entry; yields whether it worked. The kernel releases the lock of a killed process.

        What a killed process has left is not removed here: others may be writing, to units and notes (leftovers.py).

        Raises:
            UserError: where the entry lies behind a symbolic link.
        """
        for folder in [self.path, *self.path.parents][: self.depth]:
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link, and nothing behind one is written: put the folder in its place, or "
                    "let --store name where it lies."
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
        """Write `done` with the hash of every file that counts."""
        hashes = {name: files.file_hash(self.path / name) for name in self.files()}
        files.write_record(self.path / "done", {"files": hashes})

    def files(self) -> list[str]:
        """Return the names of the files that count, sorted."""
        return sorted(
            str(path.relative_to(self.path))
            for path in self.path.rglob("*")
            if path.is_file() and path.name[0] != "." and path.relative_to(self.path).parts[0] not in _UNCOUNTED
        )

    @classmethod
    def inspect(cls, folder: Path) -> list[str]:
        """Compare spec, files and `done` of the entry in a folder with their hashes and with each other.

        Args:
            folder: of an entry, damaged or not.

        Returns:
            A sentence for each fault.
        """
        if not (folder / "spec.json").exists():
            return [f"{folder} has no spec.json, so that it is no run or measurement: delete the folder."]
        return complaints(partial(cls.read, folder)) + cls(folder, Spec()).faults()

    def faults(self) -> list[str]:
        """Compare the files with the hashes in `done`, and those that it does not list (states, kept) with their own.

        Returns:
            A sentence for each fault; of the spec, which its digest vouches for, `read` says it.
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
            faults.append(f"{self.path / name} is not listed in `done`, so that nothing vouches for it. Move it away.")
        return faults

    def hashes(self) -> dict[str, str]:
        """Return the hashes in `done`; none where the entry is not finished."""
        if not self.done:
            return {}
        hashes = files.read_record(self.path / "done").get("files")
        if not isinstance(hashes, dict) or not hashes:
            raise UserError(f"{self.path / 'done'} is damaged: it lists no files.")
        return hashes

    @property
    def provenance(self) -> dict[str, Any]:
        """Machine facts and seconds; empty where nothing ran yet."""
        path = self.path / "provenance.json"
        return files.read_record(path) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add machine facts to provenance.json; others may be adding theirs, so that it is read under a lock."""
        self.add_note(lambda _: facts)

    def add_note(self, facts: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Add to provenance.json what a function makes of what is there, under a lock."""
        with FileLock(self.path / ".note.lock"):
            known = self.provenance
            files.write_record(self.path / "provenance.json", {**known, **facts(known)})


def discard(folder: Path) -> None:
    """Delete a folder, but nothing behind a symbolic link; another process may be deleting it, too."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)


def holds_entry(folder: Path) -> bool:
    """Whether a folder is an entry's, damaged or not; one that holds a lock alone is not begun."""
    if not folder.is_dir():
        return False
    named = _NAME.fullmatch(folder.name) is not None
    return (folder / "spec.json").exists() or (named and any(path.name[0] != "." for path in folder.iterdir()))


def complaints(*acts: Callable[[], Any]) -> list[str]:
    """Act, and return the sentences of what was refused."""
    found = []
    for act in acts:
        try:
            act()
        except UserError as error:
            found.append(str(error))
    return found


def _fault(path: Path, expected: str | None) -> list[str]:
    """Read a file as its kind is read, and compare it with the hash that `done` has of it."""
    readers: dict[str, Callable[[Path], Any]] = {".safetensors": files.load_arrays, ".jsonl": files.read_rows}
    own = complaints(partial(readers[path.suffix], path)) if path.suffix in readers else []
    if own or expected in (None, files.file_hash(path)):
        return own
    return [f"{path} is damaged: its hash is not the recorded one."]
