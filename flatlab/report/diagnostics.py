"""Trace checks and scale audits of runs, as tables and pictures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

from flatlab import plots
from flatlab.results.scale_audit import ScaleAudit
from flatlab.results.trace_check import TraceCheck
from flatlab.specs.measurement import MeasurementSpec
from flatlab.store.runs import Run

CORNERS = {"run": "", "way": "", "trace": ".4g", "low": ".4g", "high": ".4g"}


def triangles(
    found: Sequence[Run], measurement: MeasurementSpec, *, out: Path
) -> tuple[pd.DataFrame, list[str], list[Path]]:
    """Return the three traces of each run with intervals, the verdicts, and pictures of the rise against the trace."""
    rows, sentences = [], []
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        figure, grid = plt.subplots(1, len(found), figsize=(3.4 * len(found), 2.8), squeeze=False, layout="constrained")
        for ax, run in zip(grid[0], found, strict=True):
            check: TraceCheck = run.result(measurement)
            for name, each in check.corners.items():
                low, high = each.interval()
                rows.append({"run": run.name, "way": name, "trace": each.value, "low": low, "high": high})
            sentences.append(f"{run.name}{measurement.under}: {check.verdict()}")
            check.plot(ax).set(title=f"{run.name}{measurement.under}")
        return pd.DataFrame(rows), sentences, plots.save(figure, out / "triangle")


def audits(
    found: Sequence[Run], measurement: MeasurementSpec, *, out: Path
) -> tuple[pd.DataFrame, list[str], list[Path]]:
    """Return the tables of all audits, sentences on what was rescaled and refused, and pictures."""
    frames, sentences = [], []
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        figure, grid = plt.subplots(len(found), 1, figsize=(6.5, 2.6 * len(found)), squeeze=False, layout="constrained")
        for ax, run in zip(grid[:, 0], found, strict=True):
            audit: ScaleAudit = run.result(measurement)
            frames.append(audit.to_frame().assign(run=run.name))
            sentences += [f"{run.name}{measurement.under}: {sentence}" for sentence in audit.remarks]
            audit.plot(ax).set_title(f"{run.name}{measurement.under}", loc="left", pad=18)  # the legend is between
        return pd.concat(frames, ignore_index=True), sentences, plots.save(figure, out / "audit")
