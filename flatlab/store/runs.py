"""The store: a run is a directory named by the digest of its spec; `done` is written last.

    <store>/<digest>/spec.json  log.jsonl  checkpoints/*.safetensors  provenance.json  done
    <store>/<digest>/state/ (resume, forks)  kept/step-*.safetensors (on request)
    <store>/<digest>/measurements/<digest>/spec.json  block-*.safetensors  result.safetensors  provenance.json  done

Progress is read from disk. `done` lists the hash of every file of the result; provenance (machine facts, seconds),
state and kept checkpoints are excluded.
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
from flatlab.specs.corruption import under
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.measurements import parse_measurement
from flatlab.specs.methods import name_of
from flatlab.specs.run import Place, RunSpec
from flatlab.store.entry import Entry, discard, holds_entry

RESULTS = {  # the class below `flatlab.results` of each metric's result
    "sphere": "sphere.SphereFlatness",
    "reach": "sphere.Reach",
    "scale_audit": "scale_audit.ScaleAudit",
    "trace_check": "trace_check.TraceCheck",
    "size": "size.FileSize",
    "latency": "size.Latency",
    "generalisation": "sharpness.Generalisation",
    "spectrum": "spectrum.MeasuredSpectrum",
    "surface": "surface.Surface",
    "connectivity": "connectivity.Connections",
    "rounding": "rounding.RoundingRises",
    "quantization_noise": "quantization_noise.NetworkNoise",
    "gradcam": "gradcam.MeasuredMaps",
}


class Measurement(Entry):
    """A measurement of a run."""

    parse = staticmethod(parse_measurement)
    depth = 3
    spec: Any  # a `MeasurementSpec`; its `metric` names the kind

    def unit(self, name: str) -> Path:
        """Return the file of one unit of the measurement: a plan, or some draws."""
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
        """Name in figures and tables, which distinguishes it from other runs of the same composition."""
        return f"{self.spec.label} {self.spec.digest[:6]}{under(self.spec.corruption)}"

    def checkpoint(self, name: str) -> Path:
        """Return the path of a checkpoint: "selected" or "last"."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def state(self, name: str) -> Path:
        """Return the path of a resume state: "resume" or "fork-<step>"."""
        return self.path / "state" / f"{name}.safetensors"

    @property
    def lineage(self) -> "Run":
        """The run of the same trajectory without an average, which stores forks and checkpoints for the others."""
        spec = self.spec.trajectory
        return Run(self.path.parent / spec.digest, spec)

    @property
    def lends(self) -> bool:
        """Whether it only stores states or checkpoints for other runs of its trajectory, its training not started."""
        if self.done or (self.path / "log.jsonl").exists():
            return False
        return any(self.path.glob("kept/step-*")) or any(self.path.glob("state/fork-*"))

    def kept(self) -> dict[int, Path]:
        """Return the checkpoints kept along the trajectory, by step (`train --keep-every`)."""
        found = self.lineage.path.glob("kept/step-*.safetensors")
        return dict(sorted((int(path.stem.removeprefix("step-")), path) for path in found))

    def kept_each(self, every: int | None = None) -> int:
        """Return the number of steps between kept checkpoints, none of which may be missing.

        Args:
            every: requested number of steps, a multiple of the stored one; None: the stored one.

        Raises:
            UserError: if the run was not trained here, is not finished, or lacks some; states how to obtain them.
        """
        spec, steps = self.spec, list(self.kept())
        if spec.made_from or spec.source:
            raise UserError(
                f"Run {spec.digest} ({name_of(spec)}) was not trained and has no iterates; name a trained run."
            )
        self.require_done()
        found = every or (steps[1] - steps[0] if len(steps) > 1 else 1)
        if not set(steps) >= set(spec.iterates(found)):
            raise UserError(
                f"Run {spec.digest} is finished, and its training kept no checkpoint every {every or 'N'} steps: "
                f"`flatlab runs rm {spec.digest[:8]}`, or name another --store, and train it again with "
                f"--keep-every {every or 'N'}; the result has the same bytes."
            )
        return found

    def keep(self, step: int) -> Path:
        """Return the path for the trajectory's checkpoint of a step, and create its folder."""
        folder = self.lineage.path / "kept"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"step-{step}.safetensors"

    def write_log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write log.jsonl completely, so that it always matches the saved state."""
        files.write_rows(self.path / "log.jsonl", rows)

    def rows(self) -> list[dict[str, Any]]:
        """Return the log's rows.

        Raises:
            UserError: if the log is damaged, or the run is finished and the log has changed since.
        """
        path = self.path / "log.jsonl"
        self.require_recorded(path)
        return files.read_rows(path) if path.exists() else []

    def create(self) -> None:
        """Create the directory with its folders."""
        super().create()
        for folder in ("checkpoints", "state", "measurements"):
            (self.path / folder).mkdir(exist_ok=True)

    def measurement(self, spec: MeasurementSpec) -> Measurement:
        """Return the measurement of this run with a given spec."""
        return Measurement(self.path / "measurements" / spec.digest, spec)

    def require_done(self) -> None:
        """Refuse a run that is not finished.

        Raises:
            UserError: if it is not finished.
        """
        if not self.done:
            raise UserError(
                f"Run {self.spec.digest} is not finished, or was removed; repeat the command that started it first."
            )

    def result(self, spec: MeasurementSpec, label: str = "") -> Any:
        """Return the result of a finished measurement of this run: an object of the metric's class in `RESULTS`.

        Args:
            spec: of the measurement; its fields stand for facts that a file does not repeat.
            label: what the user calls the run, if not by its composition.

        Raises:
            UserError: if it is not measured yet.
        """
        measurement = self.measurement(spec)
        if not measurement.done:
            raise UserError(
                f"Run {self.spec.digest} ({label or name_of(self.spec)}, {self.spec.target}) is not measured yet: "
                f"{measurement.path}."
            )
        arrays, facts = measurement.arrays(measurement.result)
        module, _, name = RESULTS[spec.metric].partition(".")
        kind = getattr(import_module(f"flatlab.results.{module}"), name)
        return kind.from_arrays(arrays, {**spec.model_dump(), **facts} if isinstance(facts, dict) else facts)

    def measurements(self) -> list[Measurement]:
        """Return the measurements that exist, finished or not."""
        return [Measurement.read(path.parent) for path in sorted((self.path / "measurements").glob("*/spec.json"))]

    def measured(self) -> int:
        """Return the number of finished measurements; their specs, which may be thousands in a store, are not read."""
        return sum(1 for _ in self.path.glob("measurements/[!.]*/done"))

    def check_data(self, fingerprint: str | None) -> None:
        """Refuse data that differ from what the run was trained on.

        Args:
            fingerprint: of the available data; None if there are none.

        Raises:
            UserError: if the run recorded another fingerprint.
        """
        _compare_data(self.spec, self.provenance.get("data_fingerprint"), fingerprint)


def _compare_data(spec: RunSpec, recorded: str | None, fingerprint: str | None) -> None:
    if None not in (recorded, fingerprint) and recorded != fingerprint:
        raise UserError(
            f"The data of {spec.dataset} differ from those that run {spec.digest} was trained on "
            f"(fingerprint {str(fingerprint)[:12]}, recorded {str(recorded)[:12]}); give the same data, or another "
            "--store."
        )


def check_data(runs: Iterable[Run], place: Place) -> None:
    """Refuse data that differ from those that runs were trained on, before these are used or resumed.

    Args:
        runs: runs, present or not.
        place: data folder, cache.

    Raises:
        UserError: if a run recorded other data; names the first.
    """
    at_hand = cache(lambda dataset: fingerprints.at_hand(dataset, place.data_dir, place.cache))
    for run in runs:
        if recorded := run.provenance.get("data_fingerprint"):
            _compare_data(run.spec, recorded, at_hand(run.spec.dataset))


class RunStore:
    """All runs in one folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def run(self, spec: RunSpec) -> Run:
        """Return the run with a given spec, present or not."""
        return Run(self.root / spec.digest, spec)

    def finished(self, name: str) -> bool:
        """Whether the run with this digest, or the measurement at this path in the store, is finished."""
        return os.path.exists(os.path.join(self.root, name, "done"))  # a Path costs ten times as much

    def runs(self) -> list[Run]:
        """Return the runs that exist, finished or not."""
        return [Run.read(folder) for folder in self.folders() if (folder / "spec.json").exists()]

    def folders(self) -> list[Path]:
        """Return the folders of runs, damaged or not; empty folders are not runs."""
        return [folder for folder in sorted(self.root.glob("[!.]*")) if holds_entry(folder)]

    def faults(self) -> list[str]:
        """Return a sentence for each file of a run or measurement that is damaged, missing, or not listed in `done`.

        Raises:
            UserError: if the folder of the store does not exist.
        """
        if not self.root.is_dir():
            raise UserError(f"The folder {self.root} does not exist; --store names the folder of the runs.")
        faults: list[str] = []
        for run in self.folders():
            faults += Run.inspect(run)
            for measurement in filter(holds_entry, sorted((run / "measurements").glob("[!.]*"))):
                faults += Measurement.inspect(measurement)
        return faults

    def folder(self, prefix: str) -> Path:
        """Return the folder of the unique run whose digest begins with a prefix, damaged or not.

        Args:
            prefix: the digest or its beginning.

        Raises:
            UserError: if no run, or more than one, matches.
        """
        found = [folder for folder in self.folders() if folder.name.startswith(prefix)]
        if len(found) != 1:
            what = f"{len(found)} runs in {self.root} begin" if found else f"No run in {self.root} begins"
            raise UserError(f"{what} with {prefix!r}; `flatlab runs list` shows them all.")
        return found[0]

    def find(self, prefix: str) -> Run:
        """Return the unique run whose digest begins with a prefix.

        Args:
            prefix: the digest or its beginning.

        Raises:
            UserError: if no run, or more than one, matches, or its spec is damaged.
        """
        return Run.read(self.folder(prefix))

    @contextmanager
    def claim(self, entries: Sequence[Entry]) -> Iterator[bool]:
        """Lock all of these entries or none; yields whether it succeeded."""
        with ExitStack() as stack:
            yield all(stack.enter_context(entry.claim()) for entry in entries)

    def remove(self, run: Run | Path) -> None:
        """Delete a run and its measurements, but nothing behind a symbolic link; refused while a process holds it.

        Args:
            run: the run, or its folder if its spec is damaged.

        Raises:
            UserError: if another process holds it.
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
                raise UserError(f"Run {path.name} is in use by another process; stop that first.") from None
            path.rename(gone)  # first: a partly deleted run must not look finished, nor conflict with a new one
            discard(gone)
