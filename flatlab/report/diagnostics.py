"""Trace checks and scale audits of runs, as tables and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from flatlab import files, plots
from flatlab.results.estimate import Estimate
from flatlab.specs.measurement import MeasurementSpec
from flatlab.store.runs import Run

CORNERS = {"run": "", "way": "", "trace": ".4g", "low": ".4g", "high": ".4g"}
WAYS = ("sphere", "trace", "density")


def triangles(
    found: Sequence[Run], measurement: MeasurementSpec, *, out: Path
) -> tuple[pd.DataFrame, list[str], list[Path]]:
    """Return the three traces of each run with intervals, the verdicts, and pictures of the rise against the trace."""
    rows, told = [], []
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        figure, grid = plt.subplots(1, len(found), figsize=(3.4 * len(found), 2.8), squeeze=False, layout="constrained")
        for ax, run in zip(grid[0], found, strict=True):
            arrays, facts = run.measured(measurement)
            for name in WAYS:
                value, stderr, freedom = facts["corners"][name]
                half = Estimate(value, stderr, freedom).half_width()
                rows.append({"run": run.name, "way": name, "trace": value, "low": value - half, "high": value + half})
            told.append(f"{run.name}: {facts['verdict']}")
            _triangle(ax, arrays, facts)
            ax.set(title=run.name)
        return pd.DataFrame(rows), told, plots.save(figure, out / "triangle")


def _triangle(ax: Any, arrays: files.Arrays, facts: dict[str, Any]) -> None:
    (line,) = ax.plot(arrays["radii"], arrays["value"], marker="o", label="2 P F / γ²")
    ax.fill_between(arrays["radii"], arrays["low"], arrays["high"], color=line.get_color(), alpha=0.25, lw=0)
    for index, name in enumerate(("trace", "density"), start=1):
        value, stderr, freedom = facts["corners"][name]
        half = Estimate(value, stderr, freedom).half_width()
        ax.axhline(
            value, color=f"C{index}", lw=1, label=f"{name} of the Hessian" if index == 1 else "density's mean × P"
        )
        ax.axhspan(value - half, value + half, color=f"C{index}", alpha=0.15, lw=0)
    if facts["quadratic_radius"]:
        ax.axvline(facts["quadratic_radius"], color="0.5", ls=":", lw=1)
    ax.set_xscale("log")
    if (arrays["low"] > 0).all() and min(value for value, *_ in facts["corners"].values()) > 0:
        ax.set_yscale("log")
    ax.set(xlabel="radius γ (L2); dotted: quadratic so far", ylabel="trace (nats)")
    ax.legend()


def audits(
    found: Sequence[Run], measurement: MeasurementSpec, *, out: Path
) -> tuple[pd.DataFrame, list[str], list[Path]]:
    """Return the tables of all audits, sentences on what was rescaled and refused, and pictures."""
    frames, told = [], []
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        figure, grid = plt.subplots(len(found), 1, figsize=(6.5, 2.6 * len(found)), squeeze=False, layout="constrained")
        for ax, run in zip(grid[:, 0], found, strict=True):
            arrays, facts = run.measured(measurement)
            frame = pd.DataFrame(facts["rows"])
            frames.append(frame.assign(run=run.name))
            kinds = [pair["kind"] for pair in facts["pairs"]]
            told.append(
                f"{run.name}: rescaled {kinds.count('norm')} layers against their BatchNorm and"
                f" {kinds.count('layers')} pairs of layers; outputs moved by {arrays['deviation'].max():.1e} of the"
                " largest."
            )
            told += [f"{run.name}: left alone {each['first']}: {each['reason']}." for each in facts["refusals"]]
            plots.factors(ax, frame)
            ax.set_title(run.name, loc="left", pad=18)  # the legend is between
        return pd.concat(frames, ignore_index=True), told, plots.save(figure, out / "audit")
