"""Hessian spectra of flat-minima methods on source and held-out domains (cf. QT-DoG, section 3.3).

The paper argues that a small Hessian means a flat minimum and shows none; here are the density of its eigenvalues, its
largest eigenvalue and its trace, around the checkpoint that training-domain validation selects. A quantized network is
baked. Each method is compared with ERM at the same held-out domain and seed.
"""

from typing import TYPE_CHECKING

import pandas as pd

from analyses.fig3 import BASELINE, ORDER, labelled
from flatlab import plots
from flatlab.analysis import Analysis, crossed, from_table
from flatlab.report import spectrum, tables, verdicts
from flatlab.report.panels import TITLES
from flatlab.specs.measurements import SpectrumSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ["panel", "number", "method", "held_out", "seed", "place", "value", "stderr", "low", "high", "over"]
GROUP = ["panel", "number", "method"]
TOP, TRACE, DENSITY = "top eigenvalue", "trace", "density"
SUMMARY = (
    "Difference to ERM in nats, paired by held-out domain and seed, 95 % intervals over seeds, each alone; "
    "* p < 0.05 after Holm over the methods of a column"
)
EFFORT = {  # few images and products for figures in minutes: the spread over seeds is larger than their error
    "smoke": {"images": 8, "k": 1, "tol": 0.1, "trace_budget": 32, "starts": 1, "steps": 3},
    "quick": {"images": 100, "k": 3, "tol": 0.01, "trace_budget": 32, "starts": 1, "steps": 16},
    "paper": {"images": 256, "k": 10, "tol": 0.01, "trace_budget": 64, "starts": 2, "steps": 40},
}


def measurements(setting: Setting) -> list[SpectrumSpec]:
    """Return the two measurements of each run: on the source domains, and on the held-out one."""
    return [SpectrumSpec.make(domains=domains, **EFFORT[setting.name]) for domains in TITLES]


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return top eigenvalue and trace of each run, and the mean density of each method over seeds and targets."""
    wanted = [(name, run, measurement) for name, run in labelled(setting) for measurement in measurements(setting)]
    each = spectrum.numbers(store, wanted)
    each = each[(each["index"] == 0) & each["number"].isin(["eigenvalue", TRACE])]
    each = each.assign(number=each["number"].replace("eigenvalue", TOP))
    curves = spectrum.densities(store, wanted)
    mean = curves.groupby(["panel", "method", "place"], sort=False)["value"].mean().reset_index()
    mean = mean.assign(number=DENSITY, held_out="all", seed="all", over="seeds")
    frame = pd.concat([each, tables.over_seeds(each, GROUP), mean], ignore_index=True)
    return frame.reindex(columns=COLUMNS)


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return each method's difference to ERM, paired by domain and seed; a family for each number and panel."""
    found = tables.paired(_each(frame), BASELINE, ["panel", "number"])
    return verdicts.corrected(found, found["number"].str.capitalize() + ", " + found["panel"].map(TITLES))


def _each(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["held_out"] != "all") & (frame["number"] != DENSITY)]


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the tests."""
    found = findings(frame)
    return [*verdicts.sentences(found, unit="nats"), verdicts.statement(found)]


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings with a line per method."""
    cells = findings.assign(
        where=findings["number"] + ", " + findings["panel"],
        cell=verdicts.cells(findings),
    )
    return cells.pivot_table(index="method", columns="where", values="cell", aggfunc="first", sort=False).reset_index()


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, images."""
    effort = EFFORT[setting.name]
    return (
        f"Hessian of the mean loss: {setting.words}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; {effort['images']} images per domain (in split); "
        "points: a method against ERM at one held-out domain and seed."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw densities, and top eigenvalue and trace of each method against ERM's, on source and held-out domains."""
    import matplotlib.pyplot as plt

    with plots.style():
        figure, grid = plt.subplots(2, 3, figsize=(7.0, 4.8), layout="constrained")
        for row, (panel, title) in zip(grid, TITLES.items(), strict=True):
            mine = frame[frame["panel"] == panel]
            spectrum.lines(row[0], mine[mine["number"] == DENSITY], ORDER)
            row[0].set(title=f"Density, {title}")
            for ax, number in zip(row[1:], (TOP, TRACE), strict=True):
                _pairs(ax, _each(mine)[_each(mine)["number"] == number])
                ax.set(title=f"{number.capitalize()}, {title}", xlabel="ERM (nats)", ylabel="method (nats)")
        plots.captioned(figure, grid[0, 0], caption, fontsize=7)
    return figure


def _pairs(ax: "Axes", frame: pd.DataFrame) -> None:
    """Draw each method's number over ERM's; below the diagonal a method is flatter."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    wide = frame.pivot_table(index=["held_out", "seed"], columns="method", values="value")
    for index, name in enumerate(ORDER):
        if name != BASELINE:
            ax.plot(wide[BASELINE], wide[name], plots.MARKERS[index], color=f"C{index}", markersize=3)
    if (wide > 0).all(axis=None):
        ax.set(xscale="log", yscale="log")
        for axis in (ax.xaxis, ax.yaxis):  # less than a decade: the usual ticks would have no numbers
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
    ends = [wide.min().min(), wide.max().max()]
    ax.plot(ends, ends, color="0.5", linewidth=0.8)


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    measured=lambda setting: crossed(labelled(setting), measurements(setting)),
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
)
