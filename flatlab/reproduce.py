"""Reproduce a figure or table: plan, do what is missing, tabulate, draw, and record the origin of the numbers."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from flatlab import environment, figure_files, files
from flatlab.analysis import Analysis
from flatlab.data import catalog
from flatlab.errors import UserError, WorkerError, choose
from flatlab.jobs import engine as engines
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.plan import Job, OnEvent, WorkPlan
from flatlab.report import tables, valleys, verdicts
from flatlab.specs.engine import Engine
from flatlab.specs.run import Place
from flatlab.specs.settings import QUICK, Setting
from flatlab.store.runs import Run, RunStore, check_data


@dataclass(frozen=True)
class Reproduction:
    """The files of a figure, and the findings."""

    written: list[Path]
    unchanged: list[Path]  # pictures and page, where nothing changed that they are made of
    findings: pd.DataFrame
    accuracies: pd.DataFrame
    remarks: list[str]
    cost: dict[str, float]  # seconds of its trainings and measurements, also of earlier ones

    def paths(self) -> dict[str, list[str]]:
        """Return the files as text: written and unchanged."""
        return {"written": list(map(str, self.written)), "unchanged": list(map(str, self.unchanged))}


def analysis(name: str) -> Analysis:
    """Return a figure or table of the repository's `analyses/`.

    Args:
        name: such as fig3.

    Raises:
        UserError: if `analyses/` is not found, or has no such figure.
    """
    found: Analysis = import_module(f"analyses.{choose('figure or table', name, analyses())}").FIGURE
    figure_files.source(found)  # now, not when it is drawn
    return found


def in_all() -> dict[str, Analysis]:
    """Return the figures and tables that `reproduce all` makes, by name: all except those that are made alone."""
    figures = {name: analysis(name) for name in sorted(analyses(), key=figure_files.in_order)}
    return {name: figure for name, figure in figures.items() if not figure.alone}


def analyses() -> list[str]:
    """Return the names of all figures and tables.

    Raises:
        UserError: if `analyses/` is not found.
    """
    here = str(Path.cwd())
    if find_spec("analyses") is None and (Path(here) / "analyses" / "fig3.py").exists():
        sys.path.insert(0, here)
    found = find_spec("analyses")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "`reproduce` needs analyses/, which is in flatlab's repository and not in its wheel: "
            "run it from a clone of the repository."
        )
    folders = [Path(folder) for folder in found.submodule_search_locations]
    return sorted(path.stem for folder in folders for path in folder.glob("[a-z]*.py"))


def missing(figure: Analysis, setting: Setting, store: RunStore, place: Place) -> list[Job]:
    """Return the jobs that a figure or table still needs.

    Raises:
        UserError: if several data sets are given for a figure of one.
    """
    if setting.others and len({run.dataset for run in figure.plan(setting)[0]}) == 1:
        raise UserError(f"{figure.name} shows one data set; give --dataset instead of --datasets.")
    return missing_of([figure], setting, store, place)


def missing_of(figures: Iterable[Analysis], setting: Setting, store: RunStore, place: Place) -> list[Job]:
    """Return the jobs that figures and tables still need together; shared jobs are done once."""
    plans = [each.plan(setting) for each in figures]
    runs = [run for wanted, _ in plans for run in wanted]
    measurements = [pair for _, pairs in plans for pair in pairs]
    todo = []
    for dataset in dict.fromkeys(run.dataset for run in [*runs, *(run for run, _ in measurements)]):
        sizes = catalog.sizes(dataset, Path(place.data_dir) if place.data_dir else None)
        mine = [run for run in runs if run.dataset == dataset]
        check_data(map(store.run, mine), place)
        todo += jobs_plan.missing(
            store, mine, [pair for pair in measurements if pair[0].dataset == dataset], sizes=sizes
        )
    return todo


def carry_out(todo: list[Job], store: RunStore, place: Place, *, engine: Engine, on_event: OnEvent) -> None:
    """Do jobs in worker processes.

    Args:
        todo: the jobs.
        store: receives runs and measurements.
        place: data, device, threads.
        engine: where the workers are started.
        on_event: called with the workers' events.

    Raises:
        UserError: if jobs failed; each sentence once, with its first job.
    """
    if not todo:
        return
    store.root.mkdir(parents=True, exist_ok=True)
    plan = WorkPlan(store=str(store.root.resolve()), place=place, jobs=tuple(todo))
    errors = engines.run(plan, engine, on_event=on_event)
    if errors:
        raise UserError(*_sentences(errors)) from _traces(errors)


def _sentences(errors: list[dict[str, Any]]) -> list[str]:
    """Return each error once, with the first job that raised it and the number of others."""
    jobs_by_sentence: dict[str, list[str]] = {}
    for event in errors:
        jobs_by_sentence.setdefault(event["error"], []).append(event["job"])
    found = []
    for sentence, names in jobs_by_sentence.items():
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        found.append(f"{names[0]}{others}: {sentence}")
    return found


def _traces(errors: list[dict[str, Any]]) -> WorkerError | None:
    traces = [event["trace"] for event in errors if event.get("trace")]
    return WorkerError("\n" + "\n".join(traces)) if traces else None


def place_of(found: list[Run], asked: Place) -> tuple[Place, str]:
    """Return where runs are measured, and their data set: the given folder, or that of their training.

    Args:
        found: the runs.
        asked: the place that the user chose.

    Raises:
        UserError: if the runs have different data sets, or networks of different folders.
    """
    datasets = sorted({run.spec.dataset for run in found})
    if len(datasets) > 1:
        raise UserError(f"These runs are of several data sets ({', '.join(datasets)}); measure those of one at a time.")
    models = sorted({run.spec.model for run in found if run.spec.saved})
    if len(models) > 1:
        raise UserError(f"These runs' networks are of several folders ({', '.join(models)}); measure one at a time.")
    if asked.model_dir and not models:
        raise UserError(f"--model-dir does nothing for runs of {found[0].spec.model}; leave it out.")
    if asked.data_dir:
        catalog.locate(datasets[0], Path(asked.data_dir))
    known = next((run for run in found if run.spec.saved), found[0]).provenance
    folders = {name: getattr(asked, name) or known.get(name) for name in ("data_dir", "model_dir")}
    return asked.replace(**folders), datasets[0]


def write(
    figure: Analysis, setting: Setting, store: RunStore, *, out: Path, redo: str, reference: bool = False
) -> Reproduction:
    """Tabulate and draw a finished figure; write csv, pdf, png, a page, and a json with the origin of the numbers.

    Pictures and page are left as they are if nothing changed that they are made of.

    Args:
        figure: the figure or table.
        setting: as it was run.
        store: contains the runs and measurements.
        out: folder of the pictures; those of data other than digits are written to a subfolder.
        redo: the command line that repeats it.
        reference: also write the files that the repository keeps.
    """
    frame = figure.table(store, setting)
    arrays = figure.arrays(frame, store, setting) if figure.arrays else {}
    accuracies, tests = _accuracies(figure, setting, store, frame)
    remarks = [*figure.remarks(frame), *tests, *valleys.remarks(store.run(spec) for spec in figure.plan(setting)[0])]
    record = {**_facts(figure, setting, store), "redo": redo, "caption": figure.caption(setting), "remarks": remarks}
    findings = figure.findings(frame)
    record |= {"findings": findings.to_dict("records")}
    record |= {"accuracies": accuracies.to_dict("records"), "columns": list(accuracies.columns)}
    if setting.rows:
        runs = frame[frame["over"] == "run"].drop_duplicates(["method", "held_out", "seed"])
        record |= {"rows": {"sha256": files.file_hash(Path(setting.rows)), "runs_on_page": len(runs)}}
    folder = out / _own_folder(record["setting"])
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / figure.name
    written = figure_files.write_data(stem, frame, arrays, record)
    unchanged = figure_files.unchanged(figure, stem)
    if not unchanged:
        written = [*dict.fromkeys([*written, *figure_files.draw(figure, stem)[0]])]
    if reference:
        written += _keep(figure, folder, record)
    return Reproduction(
        written, unchanged, findings, figure_files.accuracies(record), record["remarks"], record["cost"]
    )


def redraw(figure: Analysis, folder: Path, *, reference: bool = False) -> Reproduction:
    """Draw a figure and write its page again, from the files of `write`; needs neither torch nor a store.

    Args:
        figure: the figure or table.
        folder: contains its csv, npz and json.
        reference: also write the files that the repository keeps.

    Raises:
        UserError: if one of them is missing, damaged, altered or of another figure.
    """
    written, findings, record = figure_files.draw(figure, folder / figure.name)
    if reference:
        written += _keep(figure, folder, record)
    return Reproduction(written, [], findings, figure_files.accuracies(record), record["remarks"], record["cost"])


def _keep(figure: Analysis, folder: Path, record: dict[str, Any]) -> list[Path]:
    """Write the files that the repository keeps; return them."""
    own = _own_folder(record["setting"])
    root = folder.parent if own and folder.name == own else folder
    return figure_files.keep(figure, folder / figure.name, root / figure_files.REFERENCE / own)


def _own_folder(setting: dict[str, Any]) -> str:
    """Return the subfolder of the figures of a setting; empty for digits whose images are not corrupted."""
    if setting["dataset"] == QUICK.dataset and not setting.get("corruption"):
        return ""
    parts = (setting["dataset"], setting["model"], setting.get("corruption") or "")
    return "-".join(filter(None, parts)).lower().replace(":", "-")


def _accuracies(
    figure: Analysis, setting: Setting, store: RunStore, frame: pd.DataFrame
) -> tuple[pd.DataFrame, list[str]]:
    """Return the accuracies of the methods, and sentences on their tests; none for a table of the paper."""
    if figure.sheet:
        return figure.sheet(frame), []
    found = tables.accuracies(store, figure.labelled(setting))
    gains = tables.gains(found, figure.baseline)
    return tables.reached(found, gains), [*verdicts.sentences(gains), verdicts.statement(gains, name="Accuracies")]


def _facts(figure: Analysis, setting: Setting, store: RunStore) -> dict[str, Any]:
    runs, measurements = figure.plan(setting)
    here = [store.run(spec) for spec in runs]
    measured = [
        store.run(run).measurement(measurement)
        for run, measurement in [*jobs_plan.pilots(store, runs, measurements), *measurements]
    ]
    return {
        "figure": figure.title,
        "setting": setting.model_dump(mode="json"),
        "runs": {run.spec.digest: run.spec.model_dump(mode="json") for run in here},
        "measurements": {measurement.spec.digest: measurement.spec.model_dump(mode="json") for measurement in measured},
        "data_fingerprint": sorted({run.provenance.get("data_fingerprint", "unknown") for run in here}),
        "machine": environment.facts(),  # of the drawing; below, of training and measuring
        "machines": _distinct([entry.provenance.get("machine") for entry in (*here, *measured)]),
        "cost": {
            "training_seconds": round(sum(_seconds(run.provenance) for run in here if "passes" in run.provenance), 1),
            "measuring_seconds": round(sum(measurement.provenance.get("seconds", 0) for measurement in measured), 1),
        },
    }


def _seconds(provenance: dict[str, Any]) -> float:
    return float(sum(session["seconds"] for session in provenance.get("sessions", ())))


def _distinct(machines: list[dict[str, str] | None]) -> list[dict[str, str]]:
    return [dict(pairs) for pairs in sorted({tuple(sorted(each.items())) for each in machines if each})]
