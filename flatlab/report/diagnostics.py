"""Trace checks and scale audits of runs, as tables and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
            sentences.append(f"{run.name}: {check.verdict()}")
            _triangle(ax, check)
            ax.set(title=run.name)
        return pd.DataFrame(rows), sentences, plots.save(figure, out / "triangle")


def _triangle(ax: Any, check: TraceCheck) -> None:
    radii, (low, high), corners = check.flatness.radii, check.interval(), check.corners
    (line,) = ax.plot(radii, check.value, marker="o", label="2 P F / γ²")
    ax.fill_between(radii, low, high, color=line.get_color(), alpha=0.25, lw=0)
    for index, name in enumerate(("trace", "density"), start=1):
        value = corners[name].value
        ax.axhline(
            value, color=f"C{index}", lw=1, label=f"{name} of the Hessian" if index == 1 else "density's mean × P"
        )
        ax.axhspan(*corners[name].interval(), color=f"C{index}", alpha=0.15, lw=0)
    if radius := check.quadratic_radius():
        ax.axvline(radius, color="0.5", ls=":", lw=1)
    ax.set_xscale("log")
    if (low > 0).all() and min(each.value for each in corners.values()) > 0:
        ax.set_yscale("log")
    ax.set(xlabel="radius γ (L2); dotted: quadratic so far", ylabel="trace (nats)")
    ax.legend()


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
            frame = audit.to_frame()
            frames.append(frame.assign(run=run.name))
            kinds = [pair.kind for pair in audit.pairs]
            sentences.append(
                f"{run.name}: rescaled {kinds.count('norm')} layers against their BatchNorm and"
                f" {kinds.count('layers')} pairs of layers; outputs moved by {audit.deviation.max():.1e} of the"
                " largest."
            )
            sentences += [f"{run.name}: left alone {each.first}: {each.reason}." for each in audit.refusals]
            plots.factors(ax, frame)
            ax.set_title(run.name, loc="left", pad=18)  # the legend is between
        return pd.concat(frames, ignore_index=True), sentences, plots.save(figure, out / "audit")
