"""An entry of the store: a directory named by the digest of its spec, whole once `done` is there.

`done` lists the hash of every file that counts; provenance (machine facts, seconds) and state are outside it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from flatlab import files
from flatlab.errors import UserError
from flatlab.specs import Spec

_UNCOUNTED = ("state", "kept", "probes", "provenance.json", "done", ".lock")  # outside the compared bytes


class Entry:
    """A directory with a spec, files, and a `done` that is written last."""

    parse: Callable[[str], Spec]  # its spec, from JSON

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
        """Try to lock the entry; yields whether it worked. The kernel releases the lock of a killed process."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            # Of a process killed inside a write. Two levels deep only: a run's probes are claimed on their own.
            for leftover in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
                leftover.unlink(missing_ok=True)
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
            if path.is_file()
            and path.relative_to(self.path).parts[0] not in _UNCOUNTED
            and path.suffix not in (".tmp", ".lock")
        )

    def faults(self) -> list[str]:
        """Compare the files with the hashes in `done`, tensors that it does not list (states, blocks) with their own.

        Returns:
            A sentence for each fault.
        """
        if faults := complaints(self.hashes, lambda: self.provenance):
            return faults
        expected, present = self.hashes(), set(self.files())
        faults = [f"{self.path / name} is missing." for name in sorted(set(expected) - present)]
        for name in sorted(present & set(expected)):
            if files.file_hash(self.path / name) != expected[name]:
                faults.append(f"{self.path / name} is damaged: its hash is not the recorded one.")
        tensors = sorted([*self.path.glob("*.safetensors"), *self.path.glob("*/*.safetensors")])
        loose = [path for path in tensors if str(path.relative_to(self.path)) not in expected]
        return faults + complaints(*(partial(files.load_arrays, path) for path in loose))

    def hashes(self) -> dict[str, str]:
        """Return the hashes in `done`; none where the entry is not finished."""
        if not self.done:
            return {}
        hashes = files.read_record(self.path / "done").get("files")
        if not isinstance(hashes, dict):
            raise UserError(f"{self.path / 'done'} is damaged: it lists no files.")
        return hashes

    @property
    def provenance(self) -> dict[str, Any]:
        """Machine facts and seconds; empty where nothing ran yet."""
        path = self.path / "provenance.json"
        return files.read_record(path) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add machine facts to provenance.json."""
        files.write_record(self.path / "provenance.json", {**self.provenance, **facts})


def complaints(*acts: Callable[[], Any]) -> list[str]:
    """Act, and return the sentences of what was refused."""
    found = []
    for act in acts:
        try:
            act()
        except UserError as error:
            found.append(str(error))
    return found
