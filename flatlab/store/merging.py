"""`flatlab runs merge`: copy what is verified by another store's `done`, and report the rest."""

from collections import Counter
from functools import partial
from pathlib import Path

from flatlab import files
from flatlab.errors import UserError
from flatlab.store.entry import Entry, complaints
from flatlab.store.runs import Measurement, Run, RunStore

COUNTS = ("runs", "measurements", "kept checkpoints", "here already", "differ here")


def merge(theirs: RunStore, ours: RunStore) -> tuple[dict[str, int], list[str]]:
    """Copy the finished runs and measurements of another store that are not finished here, and kept checkpoints.

    Args:
        theirs: the store to read; nothing behind a symbolic link in it is read.
        ours: the store to write.

    Returns:
        Counts: runs, measurements and kept checkpoints copied, entries already present, and runs whose bytes differ
        here (for example trained on another machine): their measurements and kept checkpoints are skipped, since they
        belong to another network. And a sentence for each entry that was not copied: damaged there, or locked here.

    Raises:
        UserError: if `theirs` contains no run.
    """
    folders = theirs.folders()
    if not folders:
        raise UserError(f"{theirs.root} contains no run; a store is a folder such as ./runs.")
    counts, refused = Counter(dict.fromkeys(COUNTS, 0)), list[str]()
    for folder in folders:
        if failed := complaints(partial(_refuse_link, folder, theirs.root), partial(Run.read, folder)):
            refused += failed
            continue
        run = Run.read(folder)
        mine = ours.run(run.spec)
        if failed := complaints(partial(_take, run, mine, counts)):
            refused += failed
            continue
        if run.done and run.hashes() != mine.hashes():
            counts["differ here"] += 1
            continue
        for measurement in sorted((folder / "measurements").glob("[!.]*/done")) if run.done else []:
            refused += complaints(partial(_take_measurement, measurement.parent, mine, counts))
        refused += complaints(partial(_keep, run, mine, counts))
    return dict(counts), refused


def _take_measurement(folder: Path, mine: Run, counts: Counter[str]) -> None:
    _refuse_link(folder, folder.parents[2])
    measurement = Measurement.read(folder)
    _take(measurement, mine.measurement(measurement.spec), counts)


def _take(theirs: Entry, ours: Entry, counts: Counter[str]) -> None:
    """Copy the files listed in the `done` of a finished entry, unless it is finished here; `done` is copied last."""
    if not theirs.done:
        return
    hashes = theirs.hashes()
    if ours.done:
        counts["here already"] += 1
        return
    for name in hashes:
        _refuse_link(theirs.path / name, theirs.path)
        if not (theirs.path / name).is_file() or files.file_hash(theirs.path / name) != hashes[name]:
            raise UserError(f"{theirs.path / name} is missing or damaged, so its run or measurement is not merged.")
    if not theirs.provenance:
        raise UserError(f"{theirs.path / 'provenance.json'} is missing, so its run or measurement is not merged.")
    _copy([*hashes, "provenance.json", "done"], theirs, ours)
    counts["measurements" if isinstance(theirs, Measurement) else "runs"] += 1


def _keep(theirs: Run, ours: Run, counts: Counter[str]) -> None:
    """Copy kept checkpoints if there are none here; they may belong to a run that is not finished itself."""
    kept = sorted((theirs.path / "kept").glob("step-*.safetensors"))
    if not kept or (ours.path / "kept").exists() or (not theirs.done and ours.path.exists()):
        return
    for path in kept:
        _refuse_link(path, theirs.path)
        files.load_arrays(path)
    if not theirs.provenance:
        raise UserError(f"{theirs.path / 'provenance.json'} is missing, so {theirs.path / 'kept'} is not merged.")
    _copy([*(f"kept/{path.name}" for path in kept), "provenance.json"], theirs, ours)
    counts["kept checkpoints"] += len(kept)


def _copy(names: list[str], theirs: Entry, ours: Entry) -> None:
    for name in names:
        _refuse_link(theirs.path / name, theirs.path)
        _refuse_link(ours.path / name, ours.path)
    with ours.claim() as free:
        if not free:
            raise UserError(f"{ours.path} is in use by another process; merge again when that has finished.")
        for name in names:
            (ours.path / name).parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(ours.path / name, (theirs.path / name).read_bytes())


def _refuse_link(path: Path, root: Path) -> None:
    """Refuse a path that contains a symbolic link below a folder."""
    link = next((each for each in (path, *path.parents) if root in each.parents and each.is_symlink()), None)
    if link:
        raise UserError(f"{link} is a symbolic link, and a merge follows none: replace it by its target.")
