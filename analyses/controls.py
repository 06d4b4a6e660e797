"""Controls: effects of QT-DoG that are those of quantization, freezing, noise, or merely fewer bits (not in the paper).

Accuracy on source and held-out domains, its variation after the switch, and the primary flatness of Figure 3, the mean
of F up to ERM's rise of 0.5 nats; intervals are of differences paired by held-out domain and seed.
"""

from typing import TYPE_CHECKING

import pandas as pd

from analyses import _percent, fig3
from flatlab import plots
from flatlab.analysis import Analysis, by_method, crossed, from_table
from flatlab.report import tables, verdicts
from flatlab.report.panels import SOURCE, TARGET
from flatlab.specs.methods import RELEASED
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "ERM"
QUANTIZED = "QT-DoG"
ORDER = ("ERM", "QT-DoG", "release-parity", "freeze", "noise", "noise-kept", "RTN")
labelled = by_method(ORDER)
CONTRASTS = {  # question -> the two methods whose difference answers it
    "Quantization-aware training": ("QT-DoG", "ERM"),
    "Freezing alone": ("freeze", "ERM"),
    "What the released code trains": ("release-parity", "ERM"),
    "Quantization, where convolutions are frozen anyway": ("release-parity", "freeze"),
    "Training the quantized weights": ("QT-DoG", "release-parity"),
    "Noise of equal norm in each gradient": ("noise", "ERM"),
    "Noise that is kept, of equal norm in all": ("noise-kept", "ERM"),
    "Quantization rather than noise": ("QT-DoG", "noise"),
    "Quantization without training": ("RTN", "ERM"),
    "Training with quantization rather than rounding after": ("QT-DoG", "RTN"),
}
MEASURES = {
    "source, out": "Source domains, out split, selected on (points)",
    "source, test": "Source domains, test split (points)",
    "target, in": "Held-out domain (points)",
    "spread": "Unrest: std (points)",
    "change": "Unrest: mean change (points)",
    "source, none": "Mean of F over γ, source (nats)",
    "target, none": "Mean of F over γ, target (nats)",
    "source, filter": "Mean of F over ρ, source (nats)",
    "target, filter": "Mean of F over ρ, target (nats)",
}
KEYS = ["measure", "method", "held_out", "seed"]
SUMMARY = (
    "Differences paired by held-out domain and seed, 95 % intervals over seeds, each alone; * p < 0.05 after Holm over "
    "the questions of a column"
)


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return each measure of each run, and of each method over seeds."""
    runs = labelled(setting)
    split = "test" if setting.test_share else "out"
    accuracy = _percent.accuracies(store, runs, [(SOURCE, split), (TARGET, "in")])
    accuracy = accuracy.assign(measure=accuracy["panel"] + ", " + accuracy["split"])
    parts = [accuracy, _percent.unrest(store, runs, setting.switch_step), fig3.area_means(store, runs, setting)]
    each = pd.concat([part[[*KEYS, "value"]] for part in parts], ignore_index=True).dropna()
    return pd.concat([each.assign(over="run"), tables.over_seeds(each, ["measure", "method"])], ignore_index=True)


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the differences that answer the questions; a family of tests for each measure."""
    each = frame[(frame["over"] == "run") & frame["measure"].isin(MEASURES)]  # those of single domains are shown alone
    found = []
    for question, (method, base) in CONTRASTS.items():
        both = each[each["method"].isin((method, base))]
        held = both.groupby("measure")["method"].transform("nunique") == 2  # a derived run has no log of its own
        found.append(tables.paired(both[held], base, ["measure"]).assign(question=question))
    whole = pd.concat(found, ignore_index=True)
    return verdicts.corrected(whole, whole["measure"].map(MEASURES))


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each question and a column for each measure."""
    pair = findings["method"] + " less " + findings["baseline"]
    asked = findings.assign(question=findings["question"] + ": " + pair)
    return verdicts.by_measure(asked, MEASURES, ["question"])


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the effect of quantization-aware training on each measure, and on the controls."""
    return [*words(findings(frame)), RELEASED]


def words(findings: pd.DataFrame) -> list[str]:
    """Return a sentence for each measure, from the verdicts; a single one if there are no intervals."""
    if findings["p"].isna().all():
        return ["One seed gives no interval, so that neither an effect nor its absence is established."]
    found = findings.set_index(["measure", "method", "baseline"])["verdict"]
    sentences = []
    for measure, name in _shown(findings).items():
        whole = found[measure, QUANTIZED, BASELINE]
        against = found[measure].xs(BASELINE, level="baseline").drop(QUANTIZED)
        alike = [str(method) for method, verdict in against.items() if verdict == whole]
        moved = {str(method): verdict for method, verdict in against.items() if verdict != verdicts.NONE}
        if whole == verdicts.NONE:
            others = "; ".join(f"{method} is {verdict}" for method, verdict in moved.items())
            sentences.append(f"{name}: no effect of {QUANTIZED} is established{f', while {others}' if others else ''}.")
        elif alike:
            sentences.append(
                f"{name}: {QUANTIZED} is {whole}, and so is {', '.join(alike)}: no effect of quantization alone."
            )
        else:
            sentences.append(
                f"{name}: {QUANTIZED} is {whole}, and no control here is: an effect of quantization is possible."
            )
    return [*sentences, verdicts.statement(findings)]


def _shown(frame: pd.DataFrame) -> dict[str, str]:
    """Return the measures in a frame, with their names."""
    there = set(frame["measure"])
    return {measure: name for measure, name in MEASURES.items() if measure in there}


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, intervals."""
    return (
        f"Controls, less {BASELINE}: {setting.words}\n"
        f"Held out in turn: {', '.join(setting.held_out)}; paired by held-out domain and seed. Bars: "
        f"{setting.interval}. Unrest: of the accuracy on the held-out domain from step {setting.switch_step} on. F: "
        f"{fig3.mean_rise(setting)}. RTN: no training."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the differences to ERM: a panel for each measure, a line for each method."""
    import matplotlib.pyplot as plt

    less = findings(frame)
    less = less[less["baseline"] == BASELINE].assign(comparable=False, published=float("nan"))
    with plots.style():
        shown = _shown(less)
        rows = (len(shown) + 1) // 2
        size = (plots.COLUMN, 0.9 + rows * (0.65 + 0.13 * len(ORDER)))
        figure, grid = plt.subplots(rows, 2, figsize=size, layout="constrained", sharey=True)
        for ax, (measure, name) in zip(grid.flat, shown.items(), strict=True):
            plots.dots(ax, less[less["measure"] == measure], ORDER[1:])
            ax.axvline(0, color="0.3", linewidth=0.8)
            ax.set_title(name.replace(" (", "\n("), fontsize=7)
        plots.captioned(figure, grid[0, 0], caption)
    return figure


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    measured=lambda setting: crossed(labelled(setting), fig3.measurements(setting)),
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
)
