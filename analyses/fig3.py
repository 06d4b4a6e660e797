"""Figure 3: local flatness on spheres of growing radius, on source and held-out domains (QT-DoG, section 3.4).

Each domain is held out in turn. F is the mean rise of the loss at distance gamma in a random direction (Eq. 5),
measured around the checkpoint that training-domain validation selects. Below the published panels are the
filter-normalised ones, which do not depend on the scale of the weights. Radii are those at which ERM's loss has risen
by given amounts, except for the paper's own network; the primary quantity is the mean of F up to ERM's rise of 0.5
nats.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.analysis import Analysis, by_method, crossed, from_table, once
from flatlab.report import tables, verdicts
from flatlab.report.areas import UP_TO, areas, areas_by_domain, limits, named_by_rise
from flatlab.report.panels import SOURCE, TARGET, TITLES
from flatlab.resources import published
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import Labelled, radii_by_rise
from flatlab.specs.settings import PAPER, Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "ERM"
ORDER = ("ERM", "SAM", "SWA", "SWAD", "QT-DoG")
labelled = by_method(ORDER)
PAIRS = [("QT-DoG", other) for other in ORDER[:-1]] + [(other, BASELINE) for other in ORDER[1:-1]]
COLUMNS = ["panel", "normalisation", "method", "held_out", "seed", "radius"]
COLUMNS += ["value", "stderr", "low", "high", "over", "published", "rise", "base_loss", "chance"]
DOMAINS = ["each_domain", "highest", "ratio"]  # of the rise: by domain, the sharpest, and that over the mean
GROUP = ["panel", "normalisation", "method", "radius"]
PRINTED = {SOURCE: "train", TARGET: "test"}  # the paper's names: train and test flatness
SUMMARY = (
    f"Mean of F: the area under F from radius 0, over its length, up to ERM's rise of {UP_TO} nats or the last radius "
    "before a loss reaches chance; differences in nats, paired by held-out domain and seed, 95 % intervals over seeds, "
    "each alone; * p < 0.05 after Holm over the pairs of a column"
)
INTERVAL = ["value", "low", "high"]
SAMPLING = ("num_samples", "rel_error", "block_size", "images")
OURS = (*SAMPLING, "seed", "trial_seed", "seeds", "rises", "beyond")  # may differ from the paper's
SYMBOLS = {"none": "γ", "filter": "ρ"}
AREAS = {
    f"{panel}, {kind}": f"Mean of F over {symbol}, {panel} (nats)"
    for panel in (SOURCE, TARGET)
    for kind, symbol in SYMBOLS.items()
}
AXES = {"none": "Radius γ (L2 distance)", "filter": "Relative radius ρ (share of each filter's norm)"}


def measurements(setting: Setting) -> list[SphereSpec]:
    """Return the two measurements of each run: raw, and filter-normalised."""
    shared = {field: getattr(setting, field) for field in SAMPLING}
    risen = radii_by_rise(setting, (*setting.rises, setting.beyond))
    return [
        SphereSpec.make(radii=setting.radii or risen, normalisation="none", **shared),
        SphereSpec.make(radii=risen, normalisation="filter", **shared),
    ]


def effort(setting: Setting) -> str:
    """Return the sampling effort, as text for a caption."""
    return measurements(setting)[0].effort


def mean_rise(setting: Setting, baseline: str = f"{BASELINE}'s") -> str:
    """Return what F is and up to where its mean goes, as text for a caption."""
    return (
        f"rise of the loss, mean up to the last radius where {baseline} is at most {UP_TO} nats on the source domains "
        f"and the loss below chance, {effort(setting)}"
    )


def area_means(store: RunStore, runs: list[Labelled], setting: Setting) -> pd.DataFrame:
    """Return the mean of F of each run: of source and target domains, and of the source domains one by one."""
    wanted = [(name, run, each) for name, run in runs for each in measurements(setting)]
    curves = named_by_rise(tables.flatness(store, wanted), BASELINE)
    found = areas_by_domain(curves, limits(curves))
    return found.assign(measure=found["panel"] + ", " + found["normalisation"])


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return the curves: of each run with intervals over directions, and of each method over seeds."""
    wanted = [(name, run, measurement) for name, run in labelled(setting) for measurement in measurements(setting)]
    each = named_by_rise(tables.flatness(store, wanted), BASELINE)
    whole = pd.concat([each, tables.over_seeds(each, GROUP).merge(_by_domain(each), on=GROUP)], ignore_index=True)
    return _with_published(whole, setting)[[*COLUMNS, *DOMAINS]]


def _by_domain(each: pd.DataFrame) -> pd.DataFrame:
    """Return the means over held-out domains and seeds of the sharpest domain's rise, and of its ratio to the mean."""
    return each.groupby(GROUP, sort=False)[DOMAINS[1:]].mean().reset_index()


@once
def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of the pairs that the paper compares: in the mean of F (primary), and at each radius.

    Families: for each panel and normalisation the pairs, and secondly the radii times pairs. A radius counts up to
    ERM's rise of 0.5 nats, and where no method's loss has reached chance; the others have no verdict.
    """
    each = frame[frame["over"] == "directions"]
    ends = limits(each).set_index(["panel", "normalisation"])["limit"]
    primary = tables.paired_each(areas(each, ends.reset_index()), PAIRS, ["panel", "normalisation"])
    single = tables.paired_each(each[each["radius"] > 0], PAIRS, ["panel", "normalisation", "radius"])
    both = pd.concat([primary.assign(quantity="mean up to"), single.assign(quantity="at")], ignore_index=True)
    limit = both.join(ends, on=["panel", "normalisation"])["limit"]
    both["radius"] = both["radius"].fillna(limit)
    named = each.groupby(["normalisation", "radius"])["rise"].first()
    tests = both.join(named, on=["normalisation", "radius"])
    tests["at"] = tests["normalisation"].map(SYMBOLS) + " = " + tests["radius"].map("{:g}".format)
    upto = "Mean of F up to " + tests["at"] + " (ERM's rise: " + tests["rise"].map("{:.2g}".format) + " nats)"
    kind = upto.where(tests["quantity"] != "at", "F at single radii " + tests["normalisation"].map(SYMBOLS))
    family = kind + ", " + tests["panel"].map(TITLES)
    return verdicts.corrected(tests, family, read=tests["radius"] <= limit)


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the tests of the mean of F and at single radii, and on where the loss reaches chance."""
    found = findings(frame)
    words: dict[str, Any] = {"words": ("flatter", "sharper"), "unit": "nats"}
    single = found["quantity"] == "at"
    sentences = verdicts.sentences(found[~single].drop(columns="at"), **words)
    sentences.append(verdicts.statement(found[~single], name="Tests of the mean of F (primary)"))
    sentences += verdicts.sentences(found[single], **words)
    sentences.append(verdicts.statement(found[single], name="Tests at single radii (secondary)"))
    return [*sentences, *_chance(limits(frame[frame["over"] == "directions"]))]


def _chance(ends: pd.DataFrame) -> list[str]:
    """Return sentences on the radii from which on the loss is not below that of guessing."""
    sentences = []
    for row in ends.to_dict("records"):
        where, guess = f"{TITLES[row['panel']]}, {SYMBOLS[row['normalisation']]}", f"{row['chance']:.2f} nats"
        if np.isnan(row["met"]):
            sentences.append(f"Chance ({guess}), {where}: the loss stays below at all radii.")
        else:
            sentences.append(
                f"Chance ({guess}), {where}: reached at {row['met']:g} by {row['by']}; no verdict from there on."
            )
    return sentences


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the primary findings, a line for each pair."""
    mine = findings[findings["quantity"] != "at"]
    cells = mine.assign(
        pair=mine["method"] + " less " + mine["baseline"],
        where=[
            f"{panel}, {SYMBOLS[kind]} ≤ {radius:g}"
            for panel, kind, radius in mine[["panel", "normalisation", "radius"]].itertuples(index=False)
        ],
        cell=[
            "not read" if verdict == verdicts.UNREAD else verdicts.bracketed(*numbers, starred=p < verdicts.LEVEL)
            for verdict, p, *numbers in mine[["verdict", "p_holm", *INTERVAL]].itertuples(index=False)
        ],
    )
    return cells.pivot_table(index="pair", columns="where", values="cell", aggfunc="first", sort=False).reset_index()


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, directions, radii."""
    images = "all" if setting.images is None else f"{setting.images}"
    return (
        f"Local flatness: {setting.words}, {effort(setting)}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; {images} images per domain (in split). "
        "Mean over held-out domains; bars: 95 % interval over seeds. Radii: where ERM's loss on the source domains has "
        f"risen by {', '.join(f'{rise:g}' for rise in setting.rises)} nats, and for illustration by {setting.beyond:g}"
        f"{' (raw: those of the paper)' if setting.radii else ''}. Dotted: where the mean on the right ends, {UP_TO} "
        "nats or before chance. Grey: a method's loss is that of guessing; no verdict there. Right: 95 % intervals of "
        "each difference alone, filled where p < 0.05 after Holm."
    )


def _with_published(frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """Fill `published` if comparable: the paper's setting except seeds and sampling, raw radii, all domains."""
    frame = frame.assign(published=float("nan"))
    ours = {field: getattr(PAPER, field) for field in OURS}
    if setting.replace(**ours) != PAPER:
        return frame
    curves = published()["figures"]["3"]
    for panel, name in PRINTED.items():
        for method in ORDER:
            for radius, value in zip(curves["radii"], curves[name][method], strict=True):
                same = (frame["panel"] == panel) & (frame["method"] == method) & (frame["radius"] == radius)
                same &= (frame["normalisation"] == "none") & (frame["held_out"] == "all")
                frame.loc[same, "published"] = value
    return frame


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the published panels, below them the filter-normalised ones, and beside them the tested differences."""
    import matplotlib.pyplot as plt

    shown = frame[frame["over"] == "seeds"]
    ends = limits(frame[frame["over"] == "directions"])
    decisive = findings(frame).query("quantity != 'at'")
    with plots.style():
        figure, grid = plt.subplots(2, 3, figsize=(9.6, 5.6), layout="constrained", width_ratios=(1, 1, 0.8))
        for row, normalisation in zip(grid, AXES, strict=True):
            for ax, panel in zip(row[:2], TITLES, strict=True):
                mine = shown[(shown["panel"] == panel) & (shown["normalisation"] == normalisation)]
                _bars(ax, mine)
                _marks(ax, ends[(ends["panel"] == panel) & (ends["normalisation"] == normalisation)], mine)
                ax.set(
                    title=f"Average flatness, {TITLES[panel]}",
                    xlabel=AXES[normalisation],
                    ylabel="Flatness $F(w)$ (nats)",
                )
            _differences(row[2], decisive[decisive["normalisation"] == normalisation])
        plots.captioned(figure, grid[0, 0], caption)
    return figure


def _bars(ax: "Axes", frame: pd.DataFrame) -> None:
    """Draw a thin line with markers and staggered error bars for each method, since bands would overlap."""
    step = 0.008 * (frame["radius"].max() - frame["radius"].min())
    for index, name in enumerate(ORDER):
        rows, color = frame[frame["method"] == name].sort_values("radius"), f"C{index}"
        ax.plot(rows["radius"], rows["value"], plots.MARKERS[index], ls="-", color=color, ms=3, lw=0.9, label=name)
        aside = rows["radius"] + step * (index - (len(ORDER) - 1) / 2)
        ax.vlines(aside, rows["low"], rows["high"], color=color, linewidth=0.8, alpha=0.7)


def _marks(ax: "Axes", ends: pd.DataFrame, mine: pd.DataFrame) -> None:
    """Mark where the tested mean ends, and from where on a method's loss is that of guessing."""
    limit, met = ends[["limit", "met"]].iloc[0]
    ax.axvline(limit, color="0.3", linewidth=0.8, linestyle=":")
    right = mine["radius"].max() * 1.04
    if met <= right:
        before = mine.loc[mine["radius"] < met, "radius"].max()
        ax.axvspan((before + met) / 2, right, color="0.9", zorder=0)
        ax.annotate("chance", ((before + met) / 2, 1), xycoords=("data", "axes fraction"), fontsize=6, va="top")
    ax.set_xlim(-0.02 * right, right)


def _differences(ax: "Axes", rows: pd.DataFrame) -> None:
    """Draw the difference of each pair in the mean of F with its interval, the panels beside each other."""
    names = [f"{method} − {baseline}" for method, baseline in PAIRS]
    for index, (panel, word) in enumerate(TITLES.items()):
        mine = rows[rows["panel"] == panel].set_index(["method", "baseline"]).loc[PAIRS]
        heights = np.arange(len(PAIRS)) + 0.3 * (index - 0.5)
        plots.intervals(ax, mine, heights, mine["p_holm"] < verdicts.LEVEL, color=("0.1", "C0")[index], label=word)
    ax.vlines(0, -0.5, len(PAIRS) - 0.5, color="0.3", linewidth=0.8)  # ends above the legend
    ax.set(yticks=range(len(PAIRS)), yticklabels=names, ylim=(len(PAIRS) + 0.5, -0.5))
    ax.set(title=f"Difference in mean $F$ up to {SYMBOLS[rows['normalisation'].iloc[0]]} = {rows['radius'].max():g}")
    ax.set_xlabel("nats (left of 0: the first is flatter)")
    ax.grid(visible=False, axis="y")
    ax.legend(fontsize=7, loc="lower center", ncols=2, handletextpad=0.2, columnspacing=1)


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
