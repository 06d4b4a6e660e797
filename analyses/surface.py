"""Loss surfaces of flat-minima methods on source and held-out domains: what QT-DoG argues with (section 3.3).

Each method's checkpoint lies in the middle of a plane that two filter-normalised random directions span (Li et al.
2018, section 4): the same Gaussian draws for all methods, each filter scaled to the weights it moves, and common
contour levels. A quantized network is baked. Surfaces are averaged over held-out domains and seeds, place by place.
"""

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from analyses import fig3
from analyses.fig3 import BASELINE, ORDER, labelled
from flatlab import plots
from flatlab.report import surface, tables
from flatlab.report.panels import SOURCE, TITLES
from flatlab.specs.measurements import SurfaceSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

__all__ = ["BASELINE", "labelled"]
COLUMNS = ["panel", "number", "method", "held_out", "seed", "x", "y", "value", "stderr", "low", "high", "over"]
Values = npt.NDArray[np.float64]
GROUP = ["panel", "number", "method"]
LOSS, RISE = "loss", "mean rise"
SUMMARY = (
    "Mean rise of the loss over the plane, difference to ERM in nats, paired by held-out domain and seed, 95 %"
    " intervals over seeds; * excludes 0"
)
EFFORT = {  # all places are evaluated: a mean over methods needs the same ones
    "smoke": {"images": 8, "grid": 3, "extent": 0.5},
    "quick": {"images": 60, "grid": 13, "extent": 0.5},
    "paper": {"images": 256, "grid": 25, "extent": 0.6},
}


def measurement(setting: Setting) -> SurfaceSpec:
    """Return the measurement of each run."""
    return SurfaceSpec.make(refine=None, **EFFORT[setting.name])


def plan(setting: Setting) -> tuple[list[RunSpec], list[tuple[RunSpec, SurfaceSpec]]]:
    """Return the runs and the measurements that the figure needs."""
    runs = [spec for _, spec in labelled(setting)]
    return runs, [(run, measurement(setting)) for run in runs]


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return the mean rise over the plane of each run, and each method's mean surface over seeds and targets."""
    rows: list[dict[str, object]] = []
    sums: dict[tuple[str, str], Values] = {}
    counts: dict[tuple[str, str], int] = {}
    for name, spec in labelled(setting):
        found = surface.surface(store.run(spec), measurement(setting))
        for panel in TITLES:
            values = surface.of_panel(found, panel, spec.held_out)
            middle = len(found.x) // 2
            rows.append(_row(name, panel, spec, float((values - values[middle, middle]).mean())))
            sums[name, panel] = sums.get((name, panel), np.zeros(values.shape)) + values
            counts[name, panel] = counts.get((name, panel), 0) + 1
    each = pd.DataFrame(rows)
    surfaces = pd.concat([_surface(*key, (found.x, found.y), total / counts[key]) for key, total in sums.items()])
    whole = pd.concat([each, tables.over_seeds(each, GROUP), surfaces], ignore_index=True)
    return whole.reindex(columns=COLUMNS)


def _row(method: str, panel: str, spec: RunSpec, value: float) -> dict[str, object]:
    """Return one run's number; its interval would be over directions, and the plane has only two."""
    row = {"panel": panel, "number": RISE, "method": method, "held_out": spec.held_out, "seed": spec.seed}
    return {**row, "value": value, "over": "places"}


def _surface(method: str, panel: str, places: tuple[Values, Values], values: Values) -> pd.DataFrame:
    index = pd.MultiIndex.from_product(places, names=["x", "y"])
    frame = pd.DataFrame({"value": values.ravel()}, index=index).reset_index()
    return frame.assign(panel=panel, number=LOSS, method=method, held_out="all", seed="all", over="seeds")


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return each method's difference to ERM in the mean rise, paired by held-out domain and seed."""
    return tables.paired(_each(frame), BASELINE, ["panel", "number"])


def _each(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["held_out"] != "all") & (frame["number"] == RISE)]


def remarks(frame: pd.DataFrame) -> list[str]:
    """Say in how many pairs a method's surface rises less than ERM's, and where it is lowest."""
    each = _each(frame).pivot_table(index=["panel", "held_out", "seed"], columns="method", values="value")
    said = []
    for panel, title in TITLES.items():
        pairs = each.xs(panel, level="panel")
        counts = [f"{name} {int((pairs[name] < pairs[BASELINE]).sum())}" for name in ORDER if name != BASELINE]
        said.append(f"Surface, {title}: rises less than ERM's in {', '.join(counts)} of {len(pairs)} pairs.")
    return said


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings with a line per method: enough to read on a screen."""
    cells = findings.assign(
        where=findings["panel"].map(TITLES),
        cell=[tables.bracketed(v, lo, hi) for v, lo, hi in findings[fig3.TOLD].itertuples(index=False)],
    )
    return cells.pivot_table(index="method", columns="where", values="cell", aggfunc="first", sort=False).reset_index()


def caption(setting: Setting) -> str:
    """Say in a title and a line below which data, seeds and places the picture shows."""
    effort = EFFORT[setting.name]
    return (
        f"Loss surfaces: {setting.words}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; {effort['images']} images per domain (in split);"
        f" {effort['grid']} x {effort['grid']} places. Mean over held-out domains and seeds; contours: nats."
    )


def draw(frame: pd.DataFrame, caption: str) -> Figure:
    """Draw the mean surfaces, methods side by side, the source domains above the held-out one, on common levels."""
    shown = frame[frame["number"] == LOSS]
    levels = plots.contour_levels([shown["value"].to_numpy(float)], 10)
    with plots.style():
        figure, grid = plt.subplots(2, len(ORDER), figsize=(9.0, 4.3), layout="constrained", sharex=True, sharey=True)
        for row, (panel, title) in zip(grid, TITLES.items(), strict=True):
            for ax, method in zip(row, ORDER, strict=True):
                mine = shown[(shown["panel"] == panel) & (shown["method"] == method)]
                wide = mine.pivot_table(index="x", columns="y", values="value", dropna=False)
                places = (wide.index.to_numpy(float), wide.columns.to_numpy(float))
                filled = plots.contours(ax, places, wide.to_numpy(float), levels=levels)
                ax.plot(0, 0, "+", color="white", markersize=5)
                ax.set(title=method if panel == SOURCE else "", aspect="equal")
            row[0].set(ylabel=f"{title}\ndirection 2")
        figure.colorbar(filled, ax=grid, label="loss (nats)", format="%.2g", pad=0.01)
        head, _, rest = caption.partition("\n")
        figure.suptitle(head, fontsize=9)
        figure.supxlabel(f"direction 1 (both: share of each filter's norm)\n{rest}", fontsize=7, color="0.3")
    return figure
