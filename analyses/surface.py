"""Loss surfaces of flat-minima methods on source and held-out domains (cf. QT-DoG, section 3.3).

Each method's checkpoint is the middle of a plane that two filter-normalised random directions span (Li et al. 2018,
section 4): the same Gaussian draws for all methods, each filter scaled to the weights it moves, and common contour
levels. A quantized network is baked. Surfaces are averaged over held-out domains and seeds, place by place.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from analyses.fig3 import BASELINE, ORDER, labelled
from flatlab import plots
from flatlab.analysis import Analysis, crossed, from_table
from flatlab.report import surface, tables, verdicts
from flatlab.report.areas import UP_TO
from flatlab.report.panels import SOURCE, TITLES
from flatlab.specs.measurements import SurfaceSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]
GROUP = ["panel", "number", "method"]
COLUMNS = [*GROUP, *["held_out", "seed", "x", "y", "value", "stderr", "low", "high", "over", "counted"]]
LOSS, RISE = "loss", "mean rise"
SUMMARY = (
    f"Mean rise of the loss over the places where ERM's is at most {UP_TO} nats on the source domains, difference to "
    "ERM in nats, paired by held-out domain and seed, 95 % intervals over seeds, each alone; * p < 0.05 after Holm "
    "over the methods of a column"
)
EFFORT = {  # all places are evaluated: a mean over methods needs the same ones
    "smoke": {"images": 8, "grid": 3, "extent": 0.5},
    "quick": {"images": 60, "grid": 13, "extent": 0.5},
    "paper": {"images": 256, "grid": 25, "extent": 0.6},
}


def measurement(setting: Setting) -> SurfaceSpec:
    """Return the measurement of each run."""
    return SurfaceSpec.make(refine=None, **EFFORT[setting.name])


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return each run's mean rise over the places that count, and each method's mean surface over seeds and targets.

    Places count if ERM's mean loss on the source domains has risen by at most 0.5 nats there, as in Figure 3: further
    out the loss soon reaches chance level.
    """
    rises: dict[tuple[str, str, RunSpec], Values] = {}
    sums: dict[tuple[str, str], Values] = {}
    counts: dict[tuple[str, str], int] = {}
    for name, spec in labelled(setting):
        found = store.run(spec).result(measurement(setting), name)
        for panel in TITLES:
            values = surface.of_panel(found, panel, spec.held_out)
            middle = len(found.x) // 2
            rises[name, panel, spec] = values - values[middle, middle]
            sums[name, panel] = sums.get((name, panel), np.zeros(values.shape)) + values
            counts[name, panel] = counts.get((name, panel), 0) + 1
    counted = np.mean([rise for (*where, _), rise in rises.items() if where == [BASELINE, SOURCE]], axis=0) <= UP_TO
    each = pd.DataFrame([_row(*key, float(rise[counted].mean())) for key, rise in rises.items()])
    surfaces = pd.concat([_surface(*key, (found.x, found.y), total / counts[key]) for key, total in sums.items()])
    surfaces["counted"] = np.tile(counted.ravel(), len(sums))
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
    """Return each method's difference to ERM in the mean rise, paired by domain and seed; a family a panel."""
    found = tables.paired(_each(frame), BASELINE, ["panel", "number"])
    return verdicts.corrected(found, "Mean rise, " + found["panel"].map(TITLES))


def _each(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["held_out"] != "all") & (frame["number"] == RISE)]


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the tests, and on the places that count."""
    found, places = findings(frame), frame[frame["number"] == LOSS]
    inside = places[places["counted"].astype(bool)]
    explained = (
        f"{len(inside) / len(places):.0%} of the places count, the same for all methods: where ERM's mean rise on the "
        f"source domains is at most {UP_TO} nats. The highest mean loss of a method there is "
        f"{inside['value'].max():.2f} nats (guessing: the logarithm of the number of classes)."
    )
    return [*verdicts.sentences(found, unit="nats"), verdicts.statement(found), explained]


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings with a line per method."""
    cells = findings.assign(
        where=findings["panel"].map(TITLES),
        cell=verdicts.cells(findings),
    )
    return cells.pivot_table(index="method", columns="where", values="cell", aggfunc="first", sort=False).reset_index()


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, places."""
    effort = EFFORT[setting.name]
    return (
        f"Loss surfaces: {setting.words}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; {effort['images']} images per domain (in split);"
        f" {effort['grid']} x {effort['grid']} places. Mean over held-out domains and seeds; contours: nats. "
        f"Dotted: places that count, where ERM's mean rise on the source domains is at most {UP_TO} nats."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the mean surfaces, methods side by side, the source domains above the held-out one, on common levels."""
    import matplotlib.pyplot as plt

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
                inside = mine.pivot_table(index="x", columns="y", values="counted", aggfunc="first").to_numpy(float)
                if not inside.all():
                    ax.contour(*places, inside.T, levels=[0.5], colors="white", linestyles=":", linewidths=0.8)
                ax.plot(0, 0, "+", color="white", markersize=5)
                ax.set(title=method if panel == SOURCE else "", aspect="equal")
                ax.locator_params(nbins=3)
            row[0].set(ylabel=f"{title}\ndirection 2")
        figure.colorbar(filled, ax=grid, label="loss (nats)", format="%.2g", pad=0.01)
        label = "\ndirection 1 (both: share of each filter's norm)\n"
        plots.captioned(figure, None, caption.replace("\n", label, 1), fontsize=7)
    return figure


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    measured=lambda setting: crossed(labelled(setting), [measurement(setting)]),
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
)
