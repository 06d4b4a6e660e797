"""Bit widths as radii: from measured runs to a tidy table and its picture. Torch-free."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.report import tables
from flatlab.report.panels import SOURCE, TARGET, strata_of
from flatlab.results.rounding import RoundingRises
from flatlab.specs.measurements import RoundingSpec
from flatlab.specs.run import RunSpec
from flatlab.store.runs import Run, RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Rise of the loss by rounding (nats), beside random directions as long on the whole, or in each channel"
NULLS = {"none": "isotropic", "layer": "isotropic", "filter": "channel"}
LOOKS = {"isotropic": "random, same norm", "channel": "random, same norm in each channel"}
OWN = "own"  # the run's own quantizer, on an axis of bits
KEYS = ["panel", "method", "part", "perturbation", "null", "quantity"]
COLUMNS = ["panel", "method", "held_out", "seed", "part", "perturbation", "null", "quantity"]
COLUMNS += ["gamma", "share", "value", "stderr", "low", "high", "over"]
SHOWN = {"method": "", "panel": "", "perturbation": "", "gamma": ".3g", "share": ".3f", "rise": ".4g"}
SHOWN |= {"isotropic": ".4g", "isotropic z": "+.1f", "channel": ".4g", "channel z": "+.1f", "channel rank": ".2f"}
LINEAR, FLOOR = 1e-3, 2e-3  # nats: linear range of the axis of rises around zero, and its lower end
RULED = 2.0  # standard deviations within which about 95 % of random directions lie


def rises(store: RunStore, wanted: Iterable[tuple[str, RunSpec, RoundingSpec]]) -> pd.DataFrame:
    """Return tidy rows: for each run, panel, part, perturbation and null the quantities below.

    `rise` and `reverse` of the noise and of its opposite, `random` (mean over random ones of the same norm, with
    its interval over directions), in nats; `z` and `rank` of the noise's rise among the random rises.

    Args:
        store: contains the finished measurements.
        wanted: method's name, run, measurement.
    """
    rows = [_rows(store.run(spec), measurement, label) for label, spec, measurement in wanted]
    return pd.concat(rows, ignore_index=True)[COLUMNS]


def _rows(run: Run, measurement: RoundingSpec, label: str) -> pd.DataFrame:
    """Return the rows of one run; only the random mean has an interval over directions."""
    found: RoundingRises = run.result(measurement, label)
    panels = [
        found.of(strata_of(found.strata, panel, run.spec.held_out)).to_frame().assign(panel=panel)
        for panel in (SOURCE, TARGET)
    ]
    random = pd.concat(panels).rename(columns={"name": "perturbation", "radius": "gamma"}).assign(quantity="random")
    bare = {"stderr": np.nan, "low": np.nan, "high": np.nan}
    own = [random.assign(**bare, quantity=name, value=random[name]) for name in ("rise", "reverse", "z", "rank")]
    frame = pd.concat([random, *own]).reset_index(names="place").sort_values(["place", "panel"], kind="stable")
    return frame.assign(
        null=frame["normalisation"].map(NULLS),
        share=frame["gamma"] / found.norm,
        method=label,
        held_out=run.spec.held_out,
        seed=run.spec.seed,
    )


def with_seeds(each: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run, and below them their means over held-out domains with intervals over seeds."""
    whole = tables.over_seeds(each, KEYS)
    lengths = each.groupby(KEYS)[["gamma", "share"]].mean().reset_index()
    return pd.concat([each, whole.merge(lengths, on=KEYS)], ignore_index=True)[COLUMNS]


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each perturbation of whole networks, its nulls side by side."""
    mine = rows[rows["part"] == "all"]
    names = {"random": "", "z": " z", "rank": " rank"}
    named = mine.assign(
        column=[
            f"{null}{names[quantity]}" if quantity in names else quantity
            for null, quantity in zip(mine["null"], mine["quantity"], strict=True)
        ]
    )
    keys = ["method", "panel", "perturbation", "gamma", "share"]
    table = named.pivot_table(index=keys, columns="column", values="value", aggfunc="first", sort=False)
    every = list(dict.fromkeys(named["column"]))  # a pivot drops a column of NaN: z, where all random rises are equal
    return table.reindex(columns=every).reset_index().rename_axis(columns=None)


def draw(rows: pd.DataFrame, caption: str, *, panel: str = SOURCE) -> "Figure":
    """Draw for each method the rise over gamma, and below it the noise's z among random noises of its norm.

    Args:
        rows: of one `over`: each method once.
        caption: title, line feed, notes.
        panel: "source" or "target" (the held-out domain).
    """
    import matplotlib.pyplot as plt

    shown = rows[(rows["panel"] == panel) & (rows["part"] == "all")]
    methods = list(dict.fromkeys(shown["method"]))
    with plots.style():
        size = (max(3.4, 0.7 + 3.15 * len(methods)), 5.0)
        figure, grid = plt.subplots(2, len(methods), figsize=size, layout="constrained", squeeze=False, sharey="row")
        for column, method in zip(grid.T, methods, strict=True):
            _rise(column[0], shown[shown["method"] == method])
            _standing(column[1], shown[shown["method"] == method])
            column[0].set_title(method)
        grid[0, 0].set_ylabel("Rise of the loss (nats)")
        grid[1, 0].set_ylabel("Rise of the noise, in standard\ndeviations from random (z)")
        plots.captioned(figure, grid[0, -1], caption, fontsize=7)
    return figure


def _rise(ax: "Axes", mine: pd.DataFrame) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    random = mine[(mine["quantity"] == "random") & (mine["perturbation"] != "trained")]
    plots.curves(ax, random.assign(null=random["null"].map(LOOKS)), x="gamma", by="null", order=list(LOOKS.values()))
    own = mine[(mine["quantity"] == "rise") & (mine["null"] == "channel")]
    for name, marker, rows in (
        ("rounding", "D", own[own["perturbation"] != "trained"]),
        ("own quantizer", "*", own[own["perturbation"] == "trained"]),
    ):
        if len(rows):
            bars = (rows["high"] - rows["value"]).to_numpy()
            look: dict[str, Any] = {"color": "k", "marker": marker, "markersize": 5, "linestyle": "none", "label": name}
            ax.errorbar(rows["gamma"], rows["value"], yerr=bars, elinewidth=0.8, **look)
    for name, gamma, value in zip(own["perturbation"], own["gamma"], own["value"], strict=True):
        text = "" if name == "trained" else name
        ax.annotate(text, (gamma, value), xytext=(-5, 5), textcoords="offset points", fontsize=7, ha="right")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yscale("symlog", linthresh=LINEAR)
    ax.set_ylim(bottom=-FLOOR)
    ax.set_xlabel("Norm of the noise = radius γ (L2)")


def _standing(ax: "Axes", mine: pd.DataFrame) -> None:
    from matplotlib.ticker import NullFormatter

    z = mine[mine["quantity"] == "z"].sort_values("gamma")
    places = {name: place for place, name in enumerate(dict.fromkeys(z["perturbation"]))}
    for index, null in enumerate(LOOKS):
        rows = z[z["null"] == null]
        bars = (rows["high"] - rows["value"]).to_numpy()
        x = rows["perturbation"].map(places) + 0.15 * (2 * index - 1)
        ax.errorbar(x, rows["value"], yerr=bars, fmt=plots.MARKERS[index], color=f"C{index}", elinewidth=1)
    ax.axhspan(-RULED, RULED, color="0.9", zorder=0)
    ax.axhline(0, color="0.5", linewidth=0.8)
    ax.set_yscale("symlog", linthresh=RULED)
    ax.set_yticks([-20, -10, -5, -2, 0, 2, 5, 10, 20])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(list(places.values()), [OWN if name == "trained" else name for name in places])
    ax.set_xlabel("Bits of a weight")


def chart(
    store: RunStore, found: list[Run], measurement: RoundingSpec, *, layers: str | None, out: Path
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw measured runs; write `radius.{csv,pdf,png}`.

    Args:
        store: contains the measurements.
        found: the runs.
        measurement: as measured.
        layers: pattern of those that were rounded.
        out: folder of the pictures.
    """
    frame = rises(store, [(run.name, run.spec, measurement) for run in found])
    if measurement.corruption:
        frame = frame.assign(corruption=measurement.corruption)
    caption = (
        f"Bit widths as radii\n{layers or 'All layers'}, source domains{measurement.under}; "
        f"{measurement.num_samples} random directions each, 95 % intervals over them; grey: 95 % of these"
    )
    return wide(frame), plots.save(draw(frame, caption), out / "radius", frame)
