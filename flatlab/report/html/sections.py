"""The sections of a report on runs and on saved results: the tables, sentences and pictures of the commands."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flatlab import environment, plots
from flatlab.report import panels, sphere, tables
from flatlab.report.html import conclusions
from flatlab.report.html.page import Section, figure_of, write
from flatlab.results.sphere import SphereFlatness
from flatlab.results.surface import Surface
from flatlab.specs.measurements import SphereSpec
from flatlab.store import selection
from flatlab.store.runs import Run, RunStore


def report(store: RunStore, runs: Sequence[Run], saved: Mapping[str, Any], *, out: Path, redo: str) -> Path:
    """Write `report.html`: all that is measured of runs, and saved results.

    Args:
        store: holds the runs.
        runs: finished ones.
        saved: results by name.
        out: folder.
        redo: the command that writes the same again.
    """
    sections = [_summary(store, runs, saved), *_comparisons(runs)]
    for run in runs:
        sections += _of_run(run)
    sections += [_of_result(name, found, level=2) for name, found in saved.items()]
    sections.append(_provenance(runs, redo))
    title = ", ".join([*(run.name for run in runs), *saved])
    return write(out / "report.html", f"flatlab: {title}", sections)


def _summary(store: RunStore, runs: Sequence[Run], saved: Mapping[str, Any]) -> Section:
    concluded = [sentence for name, found in saved.items() for sentence in conclusions.summary(name, found)]
    if not runs:
        return Section("Summary", concluded)
    whole, _ = tables.overview(store)
    mine = whole[whole["run"].isin([run.spec.digest for run in runs])]
    accuracies = dict(zip(mine["run"], mine["target"].astype(float), strict=True))
    words = [
        f"{run.name} ({run.spec.dataset}, {run.spec.model}, seed {run.spec.seed}) classifies "
        f"{100 * accuracies[run.spec.digest]:.1f} % of the held-out domain {run.spec.target} correctly."
        for run in runs
        if run.spec.target_logged
    ]
    caption = "Accuracies are shares of 1, of the selected checkpoint."
    return Section("Summary", [*words, *concluded], tables=[(caption, mine)])


def _comparisons(runs: Sequence[Run]) -> list[Section]:
    """Return the flatness of all runs that were measured alike, on each panel, with which run is flatter."""
    alike: dict[SphereSpec, list[Run]] = {}
    for run in runs:
        for each in run.measurements():
            if each.done and each.spec.metric == "sphere":
                alike.setdefault(each.spec, []).append(run)
    sections = []
    for spec, found in alike.items():
        for panel, title in panels.TITLES.items():
            seen = {run.name: panels.part_of(run.result(spec), panel, run.spec.held_out) for run in found}
            curves = {name: (one.radii, one.value, *one.interval()) for name, one in seen.items()}
            words = sphere.remarks(found, spec, panel=panel)
            rows = pd.concat([one.to_frame().assign(run=name) for name, one in seen.items()])
            picture = plots.bands(curves, axes=next(iter(seen.values())).axis_names)
            caption = "F in nats; 95 % intervals over directions: of these checkpoints and these images."
            sections.append(Section(f"Flatness, {title}{spec.under}", words, [picture], [(caption, rows)]))
    return sections


def _of_run(run: Run) -> list[Section]:
    sections = [Section(run.name, pictures=_training(run))]
    for each in run.measurements():
        if each.done and each.spec.metric != "sphere":
            found = run.result(each.spec)
            sections.append(_of_result(f"{run.name}: {_name(each.spec.metric)}{each.spec.under}", found, level=3))
    return sections


def _training(run: Run) -> list[Any]:
    """Return the accuracies along the training, as its log has them."""
    rows = [row for row in run.rows() if "validation" in row]
    curves = {"source domains, out split": [row["validation"] for row in rows]}
    if run.spec.target_logged:
        curves["held-out domain"] = [selection.target_accuracy(row) for row in rows]
    figure = plots.plotly().Figure()
    for name, values in curves.items():
        figure.add_scatter(x=[row["step"] for row in rows], y=values, name=name, mode="lines+markers")
    return [figure.update_layout(xaxis_title="step", yaxis_title="accuracy", template="plotly_white")]


def _of_result(title: str, found: Any, *, level: int) -> Section:
    sentences = conclusions.sentences(found)
    if isinstance(found, Surface):
        sentences.append("Drag to rotate, scroll to zoom; distances are Euclidean, in the space of the parameters.")
    picture = figure_of(found)
    tabled = hasattr(found, "to_frame") and not isinstance(found, Surface)
    kept = [("All numbers; `low` and `high` end 95 % intervals or bounds.", found.to_frame())] if tabled else []
    named = f"{title} ({type(found).__name__})" if isinstance(found, SphereFlatness) else title
    return Section(named, sentences, [] if picture is None else [picture], kept, level)


def _name(metric: str) -> str:
    return metric.replace("_", " ")


def _provenance(runs: Sequence[Run], redo: str) -> Section:
    facts = {"command that writes this report again": redo, **environment.facts()}
    rows = [{"of": "this report", "what": name, "value": str(value)} for name, value in facts.items()]
    for run in runs:
        about = {"digest": run.spec.digest, "spec": json.dumps(run.spec.model_dump(mode="json"), sort_keys=True)}
        for name, value in {**about, **run.provenance}.items():
            rows.append({"of": run.name, "what": name, "value": value if isinstance(value, str) else json.dumps(value)})
    return Section("Provenance", tables=[("Origin of the numbers.", pd.DataFrame(rows))])
