"""Figure 3: local flatness on spheres of growing radius, on the seen and on the unseen domains (QT-DoG, section 4.2).

Each domain is held out in turn. F is the mean rise of the loss at distance gamma in a random direction (Eq. 5),
measured around the checkpoint that training-domain validation selects. Below the published panels stand
their filter-normalised twins, which large weights cannot flatter.
"""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from flatlab import plots, tables
from flatlab.methods import METHODS, replicates
from flatlab.probespecs import ProbeSpec
from flatlab.resources import published
from flatlab.runs import RunStore
from flatlab.settings import PAPER, Setting
from flatlab.specs import RunSpec

BASELINE = "ERM"
ORDER = ("ERM", "SAM", "SWA", "SWAD", "QT-DoG")
COLUMNS = ["panel", "normalisation", "method", "held_out", "seed", "radius"]
COLUMNS += ["value", "stderr", "low", "high", "over", "published"]
GROUP = ["panel", "normalisation", "method", "radius"]
TITLES = {"train": "Average train flatness (seen domains)", "test": "Average test flatness (unseen domain)"}
SUMMARY = "Difference to ERM in nats, paired by held-out domain and seed, 95 % intervals over seeds; * excludes 0"
TOLD = ["value", "low", "high"]
SAMPLING = ("num_samples", "rel_error", "block_size", "images")
OURS = (*SAMPLING, "seed", "trial_seed", "seeds", "radii", "filter_radii")  # may differ from the paper's
SYMBOLS = {"none": "γ", "filter": "ρ"}
AXES = {"none": "Radius γ (L2 distance)", "filter": "Relative radius ρ (share of each filter's norm)"}


def probes(setting: Setting) -> list[ProbeSpec]:
    """Return the two measurements of each run: raw, and filter-normalised."""
    shared = {field: getattr(setting, field) for field in SAMPLING}
    radii = {"none": setting.radii, "filter": setting.filter_radii}
    return [ProbeSpec.make(radii=radii[kind], normalisation=kind, **shared) for kind in ("none", "filter")]


def labelled(setting: Setting) -> list[tuple[str, RunSpec]]:
    """Return each run with its method's name."""
    return [(name, spec) for name in ORDER for spec in replicates(METHODS[name], setting)]


def plan(setting: Setting) -> tuple[list[RunSpec], list[tuple[RunSpec, ProbeSpec]]]:
    """Return the runs and the measurements that the figure needs."""
    runs = [spec for _, spec in labelled(setting)]
    return runs, [(run, probe) for run in runs for probe in probes(setting)]


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return the curves: of each run with intervals over directions, and of each method over seeds."""
    wanted = [(name, run, probe) for name, run in labelled(setting) for probe in probes(setting)]
    each = tables.flatness(store, wanted)
    whole = pd.concat([each, tables.over_seeds(each, GROUP)], ignore_index=True)
    return _with_published(whole, setting)[COLUMNS]


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return each method's difference to ERM at each radius, paired by held-out domain and seed."""
    each = frame[(frame["over"] == "directions") & (frame["radius"] > 0)]
    return tables.paired(each, BASELINE, ["panel", "normalisation", "radius"])


def remarks(frame: pd.DataFrame) -> list[str]:
    """Say whether the order of the methods changes under filter normalisation, at the largest radii."""
    whole = frame[frame["over"] == "seeds"]
    far = whole[whole["radius"] == whole.groupby("normalisation")["radius"].transform("max")]
    said = []
    for panel in TITLES:
        orders = [
            " < ".join(far[(far["panel"] == panel) & (far["normalisation"] == kind)].sort_values("value")["method"])
            for kind in AXES
        ]
        what = "stays the same" if orders[0] == orders[1] else f"becomes {orders[1]}"
        said.append(f"{TITLES[panel]}: the order {orders[0]} {what} under filter normalisation, intervals aside.")
    return said


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings at the largest radius of each panel, a line per method: enough to read on a screen."""
    far = findings[findings["radius"] == findings.groupby("normalisation")["radius"].transform("max")]
    cells = far.assign(
        where=[
            f"{SYMBOLS[n]}={r:g} {p}" for n, r, p in zip(far["normalisation"], far["radius"], far["panel"], strict=True)
        ],
        cell=[tables.bracketed(v, lo, hi) for v, lo, hi in far[TOLD].itertuples(index=False)],
    )
    return cells.pivot_table(index="method", columns="where", values="cell", aggfunc="first", sort=False).reset_index()


def caption(setting: Setting) -> str:
    """Say in a title and a line below which data, seeds and directions the picture shows."""
    images = "all" if setting.images is None else f"{setting.images}"
    return (
        f"Local flatness: {setting.words}, {setting.effort}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; {images} images per domain (in split). "
        "Mean over held-out domains; band: 95 % interval over seeds."
    )


def _with_published(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Fill `published` where the paper did the same: its setting but for seeds and sampling, raw radii, all domains."""
    frame = frame.assign(published=float("nan"))
    ours = {field: getattr(PAPER, field) for field in OURS}
    if setting.replace(**ours) != PAPER:
        return frame
    curves = published()["figures"]["3"]
    for panel in TITLES:
        for method in ORDER:
            for radius, value in zip(curves["radii"], curves[panel][method], strict=True):
                same = (frame["panel"] == panel) & (frame["method"] == method) & (frame["radius"] == radius)
                same &= (frame["normalisation"] == "none") & (frame["held_out"] == "all")
                frame.loc[same, "published"] = value
    return frame


def draw(frame: pd.DataFrame, caption: str) -> Figure:
    """Draw the published panels, and below them their filter-normalised twins."""
    shown = frame[frame["over"] == "seeds"]
    with plots.style():
        figure, grid = plt.subplots(2, 2, figsize=(7.0, 5.4), layout="constrained")
        for row, normalisation in zip(grid, AXES, strict=True):
            for ax, panel in zip(row, TITLES, strict=True):
                mine = shown[(shown["panel"] == panel) & (shown["normalisation"] == normalisation)]
                plots.curves(ax, mine, x="radius", by="method", order=ORDER)
                ax.set(title=TITLES[panel], xlabel=AXES[normalisation], ylabel="Flatness $F(w)$ (nats)")
        title, _, rest = caption.partition("\n")
        plots.legend_above(figure, grid[0, 0], title)
        figure.supxlabel(rest, fontsize=7, color="0.3")
    return figure
