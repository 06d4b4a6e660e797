"""The study: does quantization flatten, and does it help out of domain? The paper's claims, each with its tests.

Eleven methods, less those that `--leave-out` names, at each held-out domain and seed: accuracy in and out of domain,
stability after the switch, and the primary flatness of Figure 3, raw and filter-normalised; top eigenvalue and trace of
the first seed. Tests are of differences paired by held-out domain and seed, in the families of
figures/reference/pacs-study/PROTOCOL.md.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analyses import _claims, _correlation, _grid, _percent, _rows, fig3
from flatlab import plots
from flatlab.analysis import Analysis, crossed, from_table, once
from flatlab.errors import UserError, choose
from flatlab.report import spectrum, tables, verdicts
from flatlab.report.areas import limits, named_by_rise
from flatlab.report.panels import SOURCE, TARGET
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.measurements import SpectrumSpec
from flatlab.specs.methods import METHODS, RELEASED, Labelled, replicates
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE, QUANTIZED, COARSE, STRONG = "ERM", "QT-DoG", "QT-DoG 4 bits", "strong SAM"
ORDER = ("ERM", "SWA", "SWAD", "SMA", "SAM", STRONG, QUANTIZED, COARSE, "freeze", "release-parity", "noise")
BITS, COARSE_BITS = 7, 4
RHO_FACTORS = {"PACS": 1.5}  # of the positive control; else 4, at which SAM does not learn on PACS (PROTOCOL.md)
ERROR = 0.15  # relative standard error of a run's F, for the price of it: the spread over seeds is larger
APART = (STRONG, COARSE)  # do not limit the radii: their loss may reach chance far below the others'
AGAINST = ("freeze", "release-parity", "noise", "SAM", "SWA", "SWAD", COARSE)
PAIRS = [(method, BASELINE) for method in ORDER[1:]] + [(QUANTIZED, other) for other in AGAINST]
MEASURES = {
    "test": "In-domain test (points)",
    "validation": "In domain, selected on (points)",
    "target": "Out of domain (points)",
    "spread": "Std after the switch (points)",
    "change": "Mean change after the switch (points)",
    **fig3.AREAS,
}
PERCENT = ("test", "validation", "target", "spread", "change")  # are from 0 to 100
KEYS = _rows.KEYS
FACTS = (  # beginnings of measures that are not averaged over seeds
    *("top eigenvalue", "trace", "distance from", "loss, ", "F at ", "standard error of F at "),
    *(_rows.RADIUS, _rows.LIMIT),
)
IMAGES = {"smoke": 8, "quick": 48, "paper": 256}  # of each domain, for the curvature of one seed
ALL, FEWER = "all targets", "without photo"
PHOTO = ("PACS", "photo")  # the statistics of the shared weights were measured on its photographs
MEANS = "Means over seeds, ± standard error; accuracies in percent, also of each held-out domain"
SUMMARY = (
    "Differences paired by held-out domain and seed, 95 % intervals over seeds, each alone; * p < 0.05 after Holm "
    "within the family"
)


def strong_rho(setting: Setting) -> float:
    """Return rho of the positive control."""
    return RHO_FACTORS.get(setting.dataset, 4.0) * setting.sam_rho


def methods(setting: Setting) -> list[str]:
    """Return the methods that are not left out.

    Raises:
        UserError: if there is no such method, if none is left, or if the others are compared with one of those left
            out and its rows are not given.
    """
    others = [name for name in ORDER if name != BASELINE or setting.rows]
    left = {choose("method that can be left out", name, others) for name in setting.leave_out}
    if left == {*ORDER}:
        raise UserError(f"--leave-out must leave one of {', '.join(ORDER)}, got all of them.")
    return [name for name in ORDER if name not in left]


def labelled(setting: Setting) -> list[Labelled]:
    """Return each run with its method's name.

    Raises:
        UserError: if rows of methods that are left out are not of the runs that this setting would make.
    """
    _kept(setting)
    return _runs(setting, methods(setting))


def _runs(setting: Setting, names: list[str]) -> list[Labelled]:
    own = setting.replace(bits=BITS)
    changed: dict[str, tuple[str, dict[str, Any]]] = {
        STRONG: ("SAM", {"sam_rho": strong_rho(setting)}),
        COARSE: (QUANTIZED, {"bits": COARSE_BITS}),
    }
    return [
        (name, run)
        for name in names
        for method, changes in [changed.get(name, (name, {}))]
        for run in replicates(METHODS[method], own.replace(**changes))
    ]


def spheres(setting: Setting) -> list[Any]:
    """Return Figure 3's measurements, with radii from ERM's first seed, so that seeds can be added later."""
    return list(fig3.measurements(setting.replace(seeds=1, rel_error=ERROR)))


def curvature(setting: Setting) -> list[SpectrumSpec]:
    """Return the measurements of the first seed's Hessian: few images and products."""
    effort: dict[str, Any] = {"k": 1, "tol": 0.05, "trace_budget": 32, "starts": 1, "steps": 3}
    return [SpectrumSpec.make(domains=each, images=IMAGES[setting.name], **effort) for each in ("source", "target")]


def measured(setting: Setting) -> list[tuple[RunSpec, MeasurementSpec]]:
    """Return the flatness of each run, and the curvature of those of the first seed."""
    wanted = _runs(setting, methods(setting))
    first = [(name, run) for name, run in wanted if run.seed == setting.seed]
    return [*crossed(wanted, spheres(setting)), *crossed(first, curvature(setting))]


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return each measure of each run and of each method over seeds; curvature; and rank correlations over blocks."""
    kept = _kept(setting)
    own = _single(store, setting, kept)
    _rows.same_data(own, kept)
    single = pd.concat([own, kept], ignore_index=True)
    single = single.assign(over="run").sort_values("method", key=lambda names: names.map(ORDER.index), kind="stable")
    each = single[~single["measure"].str.startswith(FACTS)][[*KEYS, "value"]]
    shown = [single, tables.over_seeds(each, ["measure", "method"]), _correlations(each)]
    return pd.concat(shown, ignore_index=True).assign(dataset=setting.dataset)


def _single(store: RunStore, setting: Setting, kept: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the runs of a store: a row for each run and measure."""
    runs = _runs(setting, methods(setting))
    split = "test" if setting.test_share else "out"
    accuracy = _percent.accuracies(store, runs, [(SOURCE, split), (TARGET, "in")])
    accuracy["measure"] = [_percent.READ[where] for where in zip(accuracy["panel"], accuracy["split"], strict=True)]
    rises = tables.flatness(store, [(method, run, each) for method, run in runs for each in spheres(setting)])
    curves = named_by_rise(rises, BASELINE)
    points = _rows.points(curves)
    again = f": {BASELINE}'s first seed was trained again, and is another network" if len(kept) else ""
    _rows.same_radii(pd.concat([points, kept]), again)
    flat = _rows.flatness(curves, _rows.limits_of(kept, curves) if len(kept) else ends(curves))
    off_grid = _grid.distances(store, runs).assign(measure=_grid.MEASURE)
    parts = [accuracy, _percent.unrest(store, runs, setting.switch_step), flat, off_grid, points]
    whole = pd.concat([part[[*KEYS, "value"]] for part in parts if len(part)], ignore_index=True)
    lacking = whole["value"].isna().groupby([whole["measure"], whole["method"]]).transform("any")
    whole = whole[~lacking]  # means need all runs; the ratio of F over domains is NaN where their mean is not above 0
    whole = pd.concat([whole, _curvature(store, runs, setting)], ignore_index=True)
    return whole.merge(_rows.origins(store, runs, _page(setting)), on=_rows.KEYS[1:])


def _page(setting: Setting) -> list[MeasurementSpec]:
    """Return the measurements of a page."""
    return [*spheres(setting), *curvature(setting)]


def ends(curves: pd.DataFrame) -> pd.DataFrame:
    """Return up to where flatness is read; `APART` do not bound it."""
    return limits(curves[~curves["method"].isin(APART)])


def _kept(setting: Setting) -> pd.DataFrame:
    """Return the rows of methods that are left out here, from the file of another store; empty without one."""
    if not setting.rows:
        return pd.DataFrame(columns=[*KEYS, "value", *_rows.MADE])
    left = [name for name in ORDER if name not in methods(setting)]
    path, runs = Path(setting.rows), _runs(setting, left)
    kept = _rows.read(path, runs, _page(setting), known=ORDER, percent=PERCENT)
    if kept.empty or (BASELINE in left and BASELINE not in set(kept["method"])):
        lacking = f"{BASELINE}, with which the others are compared" if BASELINE in left else f"one of {', '.join(left)}"
        raise UserError(f"--rows must have runs of {lacking}, which --leave-out names, got none in {path}.")
    return kept


def _curvature(store: RunStore, runs: list[Labelled], setting: Setting) -> pd.DataFrame:
    first = [(method, run) for method, run in runs if run.seed == setting.seed]
    found = spectrum.numbers(store, [(method, run, each) for method, run in first for each in curvature(setting)])
    found = found[(found["index"] == 0) & found["number"].isin(["eigenvalue", "trace"])]
    number = found["number"].replace("eigenvalue", "top eigenvalue")
    return found.assign(measure=number + ", " + found["panel"])[[*KEYS, "value", "low", "high", "over"]]


def _correlations(each: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's correlation of each flatness with accuracy out of domain; if negative, flatter is better."""
    blocks = ["held_out", "seed"]
    accuracy = each[each["measure"] == "target"].pivot(index="method", columns=blocks, values="value")
    rows = []
    for measure in [name for name in _claims.FLATNESS if name in set(each["measure"])]:
        flatness = each[each["measure"] == measure].pivot(index="method", columns=blocks, values="value")
        found = _correlation.correlations(flatness, accuracy.loc[flatness.index, flatness.columns])
        rows.append(found.assign(measure="Spearman with accuracy out of domain, " + found["kind"] + ": F, " + measure))
    shared = {"method": "all", "held_out": "all", "seed": "all", "over": "blocks"}
    return pd.concat(rows, ignore_index=True).drop(columns="kind").assign(**shared)


@once
def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of the pairs, of all targets and, for PACS, without `photo`.

    A family is a claim's tests; of the others, for each measure those less ERM, and those of QT-DoG less the others.
    Besides the verdict: the smallest effect of interest, the seeds needed for it, and the effect that is detectable.
    """
    each = frame[frame["measure"].isin(MEASURES) & (frame["over"] == "run")]
    parts = {ALL: each}
    if PHOTO in set(zip(each["dataset"], each["held_out"], strict=True)) and each["held_out"].nunique() > 1:
        parts[FEWER] = each[each["held_out"] != PHOTO[1]]
    found = pd.concat([_paired(mine).assign(targets=name) for name, mine in parts.items()], ignore_index=True)
    own = {name: mine[mine["method"] == BASELINE].groupby("measure")["value"].mean() for name, mine in parts.items()}
    found = _claims.powered(
        found.assign(seeds=each["seed"].nunique()),
        {(name, str(measure)): float(mean) for name, means in own.items() for measure, mean in means.items()},
    )
    claim = pd.Series([_claims.claim_of(row) for row in found.to_dict("records")], found.index)
    rest = found["baseline"].eq(BASELINE).map({True: f", less {BASELINE}", False: f", {QUANTIZED} less the others"})
    other = found["measure"].map(MEASURES) + rest
    family = claim.where(claim != "", other) + found["targets"].map({ALL: "", FEWER: f", {FEWER}"})
    return verdicts.corrected(found.assign(claim=claim), family)


def _pairs(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return the pairs of which both methods are there."""
    there = set(rows["method"]) | {BASELINE}
    return [pair for pair in PAIRS if there.issuperset(pair)]


def _paired(each: pd.DataFrame) -> pd.DataFrame:
    found = []
    for method, base in _pairs(each):
        both = each[each["method"].isin((method, base))]
        held = both.groupby("measure")["method"].transform("nunique") == 2  # SWA and SWAD have no log along the steps
        found.append(tables.paired(both[held], base, ["measure"]))
    return pd.concat(found, ignore_index=True)


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each pair and a column for each measure."""
    return verdicts.by_measure(findings, MEASURES, ["targets", "pair"])


def opening(findings: pd.DataFrame) -> list[str]:
    """Return the verdict on each claim, in brief."""
    return [*_claims.brief(findings, MEASURES)]


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the claims, in brief and by test, on the other differences, the ranks and the curvature."""
    found = findings(frame)
    primary = found["claim"] != ""
    sentences = [*opening(found), *_claims.sentences(found, MEASURES), *_rows.reach(frame, BASELINE)]
    sentences.append(verdicts.statement(found[primary], name="Tests of the claims (primary)"))
    sentences += verdicts.sentences(found[~primary])
    sentences.append(verdicts.statement(found[~primary], name="Other tests (secondary)"))
    if found["seeds"].max() > 1:
        sentences += [_claims.ENOUGH, _power(found)]
    released = [RELEASED] if "release-parity" in set(frame["method"]) else []
    return [*sentences, *_ranks(frame), *_curved(frame), *_grid.remarks(frame), *released]


def _power(found: pd.DataFrame) -> str:
    """Return a sentence on the differences of QT-DoG to ERM that a single test at 5 % detects with 80 % power."""
    mine = found[(found["method"] == QUANTIZED) & (found["baseline"] == BASELINE) & (found["targets"] == ALL)]
    if mine.empty:
        return f"{QUANTIZED} was left out."
    sizes = ", ".join(f"{MEASURES[name]} {size:.2g}" for name, size in mine[["measure", "detectable"]].to_numpy())
    return f"Smallest difference of {QUANTIZED} to {BASELINE} that one test at 5 % finds with 80 % power: {sizes}."


def _ranks(frame: pd.DataFrame) -> list[str]:
    rows = frame[frame["over"] == "blocks"][["measure", *fig3.INTERVAL]].itertuples(index=False)
    return [f"{name}: {verdicts.bracketed(*numbers, digits=2, starred=False)}." for name, *numbers in rows]


def _curved(frame: pd.DataFrame) -> list[str]:
    """Return sentences on top eigenvalue and trace of each method, means over held-out domains at the first seed."""
    rows = frame[frame["measure"].str.startswith(("top eigenvalue", "trace"))]
    sentences = []
    for measure, mine in rows.groupby("measure", sort=False):
        each = mine.groupby("method", sort=False)["value"].mean()
        means = ", ".join(f"{name} {value:.3g}" for name, value in each.items())
        sentences.append(
            f"{str(measure).capitalize()}, first seed, mean over targets (nats), without an interval: {means}."
        )
    return sentences


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, intervals."""
    kept = set(_kept(setting)["method"])
    left = [name for name in ORDER if name not in {*methods(setting), *kept}]
    named = f"Left out: {', '.join(left)}. " if left else ""
    named += f"From rows of an earlier store: {', '.join(name for name in ORDER if name in kept)}. " if kept else ""
    rho = {
        "SAM": f"SAM: rho {setting.sam_rho:g}. ",
        STRONG: f"{STRONG}, the positive control: {strong_rho(setting):g}. ",
    }
    rhos = "".join(words for name, words in rho.items() if name not in left)
    read = fig3.mean_rise(setting.replace(rel_error=ERROR), f"{BASELINE}'s (first seed)")
    return (
        f"Does quantization flatten, and does it help? {setting.words}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; differences paired by held-out domain and seed, bars: "
        f"{setting.tested}. F: {read}. {rhos}{named}"
        f"Stability from step {setting.switch_step} on: the standard deviation; the mean change is not drawn. "
        "Last panel: a point is a run, less the mean of all methods at its held-out domain and seed."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the differences of all pairs: accuracies, stability, flatness; and flatness against accuracy."""
    import matplotlib.pyplot as plt

    found = findings(frame)
    found = found[found["targets"] == ALL]
    inside = next(name for name in ("test", "validation") if name in set(found["measure"]))
    panels = [
        (inside,),
        ("target",),
        ("spread",),
        ("source, none", "target, none"),
        ("source, filter", "target, filter"),
    ]
    with plots.style():
        figure, grid = plt.subplots(2, 3, figsize=(9.6, 7.2), layout="constrained")
        for ax, measures in zip(grid.flat, panels, strict=False):
            _differences(ax, found, measures)
        for ax in (grid[0, 1], grid[0, 2], grid[1, 1]):
            ax.set_yticklabels([])
        _against(grid[1, 2], frame)
        plots.captioned(figure, grid[0, 0], " ".join([caption, *_rows.reach(frame, BASELINE)]))
    return figure


def _differences(ax: "Axes", found: pd.DataFrame, measures: tuple[str, ...]) -> None:
    """Draw the differences of all pairs in one measure, or in that of the source and of the target domains."""
    pairs = _pairs(found)
    for index, measure in enumerate(measures):
        rows = found[found["measure"] == measure].set_index(["method", "baseline"]).reindex(pairs)
        heights = np.arange(len(pairs)) + 0.3 * (index - (len(measures) - 1) / 2)
        look = {"color": ("0.1", "C0")[index], "label": measure.split(",")[0] if len(measures) > 1 else None}
        plots.intervals(ax, rows, heights, rows["p_holm"] < verdicts.LEVEL, **look)
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.axhline(sum(base == BASELINE for _, base in pairs) - 0.5, color="0.7", linewidth=0.6)
    names = [f"{method} − {base}" for method, base in pairs]
    ax.set(yticks=range(len(pairs)), yticklabels=names, ylim=(len(pairs) - 0.4, -0.6))
    ax.set_xlabel(MEASURES[measures[0]].replace(", source", ""))
    ax.grid(visible=False, axis="y")
    if len(measures) > 1:
        _legend(ax, columns=2)


def _against(ax: "Axes", frame: pd.DataFrame) -> None:
    """Draw the accuracy out of domain against the flatness there, both less the mean of their block."""
    each = frame[frame["over"] == "run"]
    columns = ["target, filter", "target"]
    wide = each.pivot(index=["held_out", "seed", "method"], columns="measure", values="value")[columns].dropna()
    less = wide - wide.groupby(level=["held_out", "seed"]).transform("mean")
    for index, name in enumerate(ORDER):
        if name in less.index.get_level_values("method"):
            mine = less.xs(name, level="method")
            look: dict[str, Any] = {"color": f"C{index % 10}", "label": name, "markersize": 3.5}
            if index >= len(plots.MARKERS):  # colours and markers are used up
                look["markerfacecolor"] = "white"
            ax.plot(mine["target, filter"], mine["target"], plots.MARKERS[index % len(plots.MARKERS)], **look)
    _legend(ax, columns=4)
    ax.axhline(0, color="0.7", linewidth=0.6)
    ax.axvline(0, color="0.7", linewidth=0.6)
    ax.set(xlabel="F over ρ, target, less the block's (nats)", ylabel="Out of domain, less the block's (points)")


def _legend(ax: "Axes", *, columns: int) -> None:
    """Put a small legend above a panel."""
    where: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0}
    ax.legend(**where, fontsize=6, ncols=columns, columnspacing=1, handletextpad=0.3)


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    measured=measured,
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
    opening=opening,
    sheet=lambda frame: _rows.means(frame, MEASURES),
    sheet_title=MEANS,
    rows=True,
    alone=True,
)
