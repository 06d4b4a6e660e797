"""The store: a run is a directory named by the digest of its spec, and `done` is written last.

    <store>/<digest>/spec.json  log.jsonl  checkpoints/*.safetensors  provenance.json  done
    <store>/<digest>/state/ (resume, forks)  kept/step-*.safetensors (where asked for)
    <store>/<digest>/measurements/<digest>/spec.json  block-*.safetensors  result.safetensors  provenance.json  done

Progress is read off the disk. `done` lists the hash of every file that counts; provenance (machine facts, seconds),
state and kept checkpoints are outside it.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flatlab import files
from flatlab.data import fingerprints
from flatlab.errors import UserError
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.measurements import parse_measurement
from flatlab.specs.run import Place, RunSpec
from flatlab.store.entry import Entry, discard, holds_entry

RESULTS = {  # the class below `flatlab.results` of each metric's result
    "sphere": "sphere.SphereFlatness",
}


class Measurement(Entry):
    """A measurement of a run."""

    parse = staticmethod(parse_measurement)
    depth = 3
    spec: Any  # a `MeasurementSpec`; of which kind, its metric says

    def unit(self, name: str) -> Path:
        """Return the file of one unit of the measurement: a plan, or some visits."""
        return self.path / f"unit-{name}.safetensors"

    @property
    def result(self) -> Path:
        """The file of the assembled measurement."""
        return self.path / "result.safetensors"


class Run(Entry):
    """A trained (or imported) network: its log, checkpoints and measurements."""

    parse = staticmethod(RunSpec.parse)
    spec: RunSpec

    @property
    def name(self) -> str:
        """What pictures and tables call it, apart from others of its composition."""
        return f"{self.spec.label} {self.spec.digest[:6]}"

    def checkpoint(self, name: str) -> Path:
        """Return the path of a checkpoint: "selected" or "last"."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def state(self, name: str) -> Path:
        """Return the path of a resume state: "resume" or "fork-<step>"."""
        return self.path / "state" / f"{name}.safetensors"

    @property
    def lineage(self) -> "Run":
        """The run of the same trajectory without an average: it keeps forks and checkpoints for the others, too."""
        spec = self.spec.trajectory
        return Run(self.path.parent / spec.digest, spec)

    @property
    def lends(self) -> bool:
        """Whether its own training has not begun: it only keeps states or checkpoints for runs of its trajectory."""
        kept = any(self.path.glob("kept/step-*")) or any(self.path.glob("state/fork-*"))
        return kept and not self.done and not (self.path / "log.jsonl").exists()

    def kept(self) -> dict[int, Path]:
        """Return the checkpoints that were kept along the trajectory, by step (`train --keep-every`)."""
        found = self.lineage.path.glob("kept/step-*.safetensors")
        return dict(sorted((int(path.stem.removeprefix("step-")), path) for path in found))

    def kept_each(self, every: int | None = None) -> int:
        """Return the steps between kept checkpoints, of which none may be missing.

        Args:
            every: so many steps are asked for, multiples of those of others among them; else what there is.

        Raises:
            UserError: where the run was not trained here, is not finished, or lacks some: it says how to get them.
        """
        spec, steps = self.spec, list(self.kept())
        if spec.made_from or spec.source:
            raise UserError(
                f"Run {spec.digest} ({spec.label}) was not trained itself and has no iterates; name one that was."
            )
        if not self.done:
            raise UserError(f"Run {spec.digest} is not finished; repeat the command that began it.")
        found = every or (steps[1] - steps[0] if len(steps) > 1 else 1)
        if not set(steps) >= set(spec.iterates(found)):
            raise UserError(
                f"Run {spec.digest} is finished, and its training kept no checkpoint each {every or 'N'} steps: "
                f"`flatlab runs rm {spec.digest[:8]}`, or name another --store, and train it again with "
                f"--keep-every {every or 'N'}; it ends with the same bytes."
            )
        return found

    def keep(self, step: int) -> Path:
        """Return where the trajectory's checkpoint of a step is kept, its folder made."""
        folder = self.lineage.path / "kept"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"step-{step}.safetensors"

    def write_log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write log.jsonl whole: it is always exactly as long as the state beside it."""
        files.write_rows(self.path / "log.jsonl", rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return the log's rows.

        Raises:
            UserError: where the log is damaged, or the run is finished, and it is not the one that it finished with.
        """
        path = self.path / "log.jsonl"
        if self.done and not (path.exists() and files.file_hash(path) == self.hashes().get(path.name)):
            raise UserError(
                f"{path} is damaged: its hash is not the recorded one. Remove that run, or restore the file."
            )
        return files.read_rows(path) if path.exists() else []

    def create(self) -> None:
        """Make the directory with its folders."""
        super().create()
        for folder in ("checkpoints", "state", "measurements"):
            (self.path / folder).mkdir(exist_ok=True)

    def measurement(self, spec: MeasurementSpec) -> Measurement:
        """Return the measurement of this run that a measurement spec names."""
        return Measurement(self.path / "measurements" / spec.digest, spec)

    def require_done(self) -> None:
        """Refuse to measure a run that is not finished.

        Raises:
            UserError: where it is not.
        """
        if not self.done:
            raise UserError(f"Run {self.spec.digest} is not finished, or was removed: train it before it is measured.")

    def measured(self, spec: MeasurementSpec, label: str = "") -> tuple[files.Arrays, Any]:
        """Return the arrays and facts that a finished measurement of this run has left.

        Args:
            spec: of the measurement.
            label: what the user calls the run, if not by its composition.

        Raises:
            UserError: where it is not measured yet.
        """
        measurement = self.measurement(spec)
        if not measurement.done:
            raise UserError(
                f"Run {self.spec.digest} ({label or self.spec.label}, {self.spec.held_out}) is not measured yet: "
                f"{measurement.path}."
            )
        return files.load_arrays(measurement.result)

    def result(self, spec: MeasurementSpec, label: str = "") -> Any:
        """Return the result of a finished measurement of this run, as the metric's public function returns it.

        Args:
            spec: of the measurement; its fields stand for facts that a file does not repeat.
            label: what the user calls the run, if not by its composition.

        Raises:
            UserError: where it is not measured yet.
        """
        arrays, facts = self.measured(spec, label)
        module, _, name = RESULTS[spec.metric].partition(".")
        kind = getattr(import_module(f"flatlab.results.{module}"), name)
        return kind.from_arrays(arrays, {**spec.model_dump(), **facts})

    def measurements(self) -> list[Measurement]:
        """Return the measurements that exist, finished or not."""
        return [Measurement.read(path.parent) for path in sorted((self.path / "measurements").glob("*/spec.json"))]

    def check_done(self) -> None:
        """Refuse a run that is not finished."""
        if not self.done:
            raise UserError(f"Run {self.spec.digest} is not finished; repeat the command that began it, then measure.")

    def check_data(self, fingerprint: str | None) -> None:
        """Refuse data that differ from what the run was trained on.

        Args:
            fingerprint: of the data at hand; None where there are none.

        Raises:
            UserError: where the run recorded another one.
        """
        recorded = self.provenance.get("data_fingerprint")
        if None not in (recorded, fingerprint) and recorded != fingerprint:
            raise UserError(
                f"The data of {self.spec.dataset} differ from those that run {self.spec.digest} was trained on "
                f"(fingerprint {str(fingerprint)[:12]}, recorded {str(recorded)[:12]}); give the same data, or another "
                "--store."
            )


def check_data(runs: Iterable[Run], place: Place) -> None:
    """Refuse data at hand that differ from what runs were trained on, before these are believed or gone on with.

    Args:
        runs: there or not.
        place: data folder, cache.

    Raises:
        UserError: names the first run that recorded other data.
    """
    at_hand = cache(lambda dataset: fingerprints.at_hand(dataset, place.data_dir, place.cache))
    for run in runs:
        if "data_fingerprint" in run.provenance:
            run.check_data(at_hand(run.spec.dataset))


class RunStore:
    """All runs below one folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def run(self, spec: RunSpec) -> Run:
        """Return the run that a spec names, there or not."""
        return Run(self.root / spec.digest, spec)

    def finished(self, name: str) -> bool:
        """Whether the run of that digest is finished, or the measurement at that path below the store."""
        return (self.root / name / "done").exists()

    def runs(self) -> list[Run]:
        """Return the runs that exist, finished or not."""
        return [Run.read(folder) for folder in self.folders() if (folder / "spec.json").exists()]

    def folders(self) -> list[Path]:
        """Return the folders of runs, damaged or not; one that holds nothing is not begun."""
        return [folder for folder in sorted(self.root.glob("[!.]*")) if holds_entry(folder)]

    def faults(self) -> list[str]:
        """Return a sentence for each file of a run or measurement that is damaged, missing, or not vouched for.

        Raises:
            UserError: where the store's folder is not there.
        """
        if not self.root.is_dir():
            raise UserError(f"There is no folder {self.root}; --store names the folder of the runs.")
        faults: list[str] = []
        for run in self.folders():
            faults += Run.inspect(run)
            for measurement in filter(holds_entry, sorted((run / "measurements").glob("[!.]*"))):
                faults += Measurement.inspect(measurement)
        return faults

    def folder(self, prefix: str) -> Path:
        """Return the folder of the one run whose digest begins so, damaged or not.

        Args:
            prefix: the digest or its beginning.

        Raises:
            UserError: where none or several runs do.
        """
        found = [folder for folder in self.folders() if folder.name.startswith(prefix)]
        if len(found) != 1:
            what = f"{len(found)} runs in {self.root} begin" if found else f"No run in {self.root} begins"
            raise UserError(f"{what} with {prefix!r}; `flatlab runs list` shows them all.")
        return found[0]

    def find(self, prefix: str) -> Run:
        """Return the one run whose digest begins so.

        Args:
            prefix: the digest or its beginning.

        Raises:
            UserError: where none or several runs do, or its spec is damaged.
        """
        return Run.read(self.folder(prefix))

    @contextmanager
    def claim(self, entries: Sequence[Entry]) -> Iterator[bool]:
        """Lock all of these or none; yields whether it worked."""
        with ExitStack() as stack:
            yield all(stack.enter_context(entry.claim()) for entry in entries)

    def remove(self, run: Run | Path) -> None:
        """Delete a run and its measurements, but nothing behind a symbolic link; refused while a process works on it.

        Args:
            run: the run, or its folder, where its spec is damaged.

        Raises:
            UserError: where another process holds it.
        """
        path = run if isinstance(run, Path) else run.path
        if path.is_symlink():
            path.unlink()
            return
        gone = self.root / f".removed-{path.name}"
        discard(gone)  # of a removal that was killed
        holders = [path, *(each for each in (path / "measurements").glob("[!.]*") if each.is_dir())]
        inside = [each for each in holders if not (each.is_symlink() or each.parent.is_symlink())]
        with ExitStack() as stack:
            try:
                for folder in inside:
                    stack.enter_context(FileLock(folder / ".lock", timeout=0))
            except Timeout:
                raise UserError(f"Run {path.name} is being worked on by another process; stop that first.") from None
            path.rename(gone)  # at once: a half-deleted run must not look finished, nor get in a new one's way
            discard(gone)
