"""The store: a run is a directory named by the digest of its spec, and `done` is written last.

    <store>/<digest>/spec.json  log.jsonl  checkpoints/*.safetensors  state/ (resume, forks)  provenance.json  done
    <store>/<digest>/probes/<digest>/spec.json  block-*.safetensors  result.safetensors  provenance.json  done

Progress is read off the disk. `done` lists the hash of every file that counts; provenance (machine facts, seconds)
and state are outside it.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flatlab import files
from flatlab.errors import UserError
from flatlab.specs import ProbeSpec, RunSpec, Spec

_UNCOUNTED = ("state", "probes", "provenance.json", "done", ".lock")  # outside the compared bytes


class Entry:
    """A directory with a spec, files, and a `done` that is written last."""

    def __init__(self, path: Path, spec: Spec) -> None:
        self.path, self.spec = path, spec

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
        self.create()
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            for leftover in self.path.rglob(".*.tmp"):  # of a process killed inside a write
                leftover.unlink(missing_ok=True)
            yield True
        finally:
            lock.release()

    def finish(self) -> None:
        """Write `done` with the hash of every file that counts."""
        files.write_json(
            self.path / "done", {"files": {name: files.file_hash(self.path / name) for name in self.files()}}
        )

    def files(self) -> list[str]:
        """Return the names of the files that count, sorted."""
        return sorted(
            str(path.relative_to(self.path))
            for path in self.path.rglob("*")
            if path.is_file()
            and path.relative_to(self.path).parts[0] not in _UNCOUNTED
            and not path.name.endswith(".tmp")
        )

    def faults(self) -> list[str]:
        """Compare the files with the hashes in `done`; return a sentence for each fault."""
        if not self.done:
            return []
        try:
            expected: dict[str, str] = json.loads((self.path / "done").read_text())["files"]
        except (ValueError, KeyError, TypeError):
            return [f"{self.path / 'done'} is damaged."]
        present = set(self.files())
        faults = [f"{self.path / name} is missing." for name in sorted(set(expected) - present)]
        for name in sorted(present & set(expected)):
            if files.file_hash(self.path / name) != expected[name]:
                faults.append(f"{self.path / name} is damaged: its hash is not the recorded one.")
        return faults

    @property
    def provenance(self) -> dict[str, Any]:
        """Machine facts and seconds; empty where nothing ran yet."""
        path = self.path / "provenance.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add machine facts to provenance.json."""
        files.write_json(self.path / "provenance.json", {**self.provenance, **facts})


class Probe(Entry):
    """A measurement of a run."""

    spec: ProbeSpec

    def block(self, index: int) -> Path:
        """Return the file of one block of directions."""
        return self.path / f"block-{index:04d}.safetensors"

    @property
    def result(self) -> Path:
        """The file of the assembled measurement."""
        return self.path / "result.safetensors"


class Run(Entry):
    """A trained (or imported) network: its log, checkpoints and probes."""

    spec: RunSpec

    def checkpoint(self, name: str) -> Path:
        """Return the path of a checkpoint: "selected" or "last"."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def state(self, name: str) -> Path:
        """Return the path of a resume state: "resume" or "fork-<step>"."""
        return self.path / "state" / f"{name}.safetensors"

    def write_log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write log.jsonl whole: it is always exactly as long as the state beside it."""
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        files.write_bytes(self.path / "log.jsonl", text.encode())

    def rows(self) -> list[dict[str, Any]]:
        """Return the log's rows."""
        path = self.path / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def create(self) -> None:
        """Make the directory with its folders."""
        super().create()
        for folder in ("checkpoints", "state", "probes"):
            (self.path / folder).mkdir(exist_ok=True)

    def probe(self, spec: ProbeSpec) -> Probe:
        """Return the measurement of this run that a probe spec names."""
        return Probe(self.path / "probes" / spec.digest, spec)

    def probes(self) -> list[Probe]:
        """Return the measurements that exist, finished or not."""
        folders = sorted((self.path / "probes").glob("*/spec.json"))
        return [Probe(path.parent, ProbeSpec.parse(path.read_text())) for path in folders]

    def check_data(self, fingerprint: str) -> None:
        """Refuse data that differ from what the run was trained on.

        Args:
            fingerprint: of the data at hand.

        Raises:
            UserError: where the run recorded another one.
        """
        recorded = self.provenance.get("data_fingerprint")
        if recorded not in (None, fingerprint):
            raise UserError(
                f"The data of {self.spec.dataset} differ from those that run {self.spec.digest} was trained on "
                f"(fingerprint {fingerprint[:12]}, recorded {recorded[:12]}); give the same data, or another --store."
            )


class RunStore:
    """All runs below one folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def run(self, spec: RunSpec) -> Run:
        """Return the run that a spec names, there or not."""
        return Run(self.root / spec.digest, spec)

    def runs(self) -> list[Run]:
        """Return the runs that exist, finished or not."""
        found = sorted(self.root.glob("*/spec.json"))
        return [Run(path.parent, RunSpec.parse(path.read_text())) for path in found]

    def faults(self) -> list[str]:
        """Return a sentence for each file of a finished run or probe that is damaged or missing."""
        return [fault for run in self.runs() for entry in (run, *run.probes()) for fault in entry.faults()]

    def find(self, prefix: str) -> Run:
        """Return the one run whose digest begins so.

        Args:
            prefix: the digest or its beginning.

        Raises:
            UserError: where none or several runs do.
        """
        found = [run for run in self.runs() if run.path.name.startswith(prefix)]
        if len(found) != 1:
            what = "No run" if not found else f"{len(found)} runs"
            raise UserError(f"{what} in {self.root} begins with {prefix!r}; `flatlab runs list` shows them all.")
        return found[0]

    @contextmanager
    def claim(self, entries: Sequence[Entry]) -> Iterator[bool]:
        """Lock all of these or none; yields whether it worked."""
        with ExitStack() as stack:
            yield all(stack.enter_context(entry.claim()) for entry in entries)

    def remove(self, run: Run) -> None:
        """Delete a run and its probes; refused while a process works on it.

        Args:
            run: the run.

        Raises:
            UserError: where another process holds it.
        """
        with run.claim() as free:
            if not free:
                raise UserError(f"Run {run.path.name} is being worked on by another process; stop that first.")
            (run.path / "done").unlink(missing_ok=True)  # first: a half-deleted run must not look finished
        shutil.rmtree(run.path)

    def merge(self, other: "RunStore") -> dict[str, int]:
        """Copy the finished runs and probes of another store that are not finished here.

        Args:
            other: the store to read.

        Returns:
            Counts: runs and probes copied, entries that were here already.

        Raises:
            UserError: where `other` holds no run, or a run there is damaged.
        """
        counts = {"runs": 0, "probes": 0, "here already": 0}
        theirs = other.runs()
        if not theirs:
            raise UserError(f"{other.root} holds no run; a store is a folder such as ./runs.")
        for run in theirs:
            ours = self.run(run.spec)
            counts["runs" if _adopt(run, ours) else "here already"] += run.done
            for probe in run.probes() if ours.done else []:
                counts["probes" if _adopt(probe, ours.probe(probe.spec)) else "here already"] += probe.done
        return counts


def _adopt(theirs: Entry, ours: Entry) -> bool:
    """Copy a finished entry to where none is finished; `done` arrives last."""
    if not theirs.done or ours.done:
        return False
    if faults := theirs.faults():
        raise UserError(f"Not merged: {faults[0]}")
    with ours.claim() as free:
        if not free:
            raise UserError(f"{ours.path} is being worked on by another process; merge when it is finished.")
        for name in [*theirs.files(), "provenance.json"]:
            target = ours.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (theirs.path / name).exists():
                files.write_bytes(target, (theirs.path / name).read_bytes())
        files.write_bytes(ours.path / "done", (theirs.path / "done").read_bytes())
    return True
