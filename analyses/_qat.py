"""Quantization from the first step compared with full precision: the shared part of `gaqat` and `fqat`.

Rows ERM, SAGM, LSQ, LSQ+SAM, LSQ+SAGM, SAQ, GAQAT and FQAT: at 4/4 bits (weights/layers' inputs) on all held-out
domains; at 3/3 bits, and the ablations, on the last one. Tests are of differences paired by held-out domain and seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analyses import _disorder, _percent, fig3
from flatlab import plots
from flatlab.analysis import Analysis, Measured, crossed, from_table, once
from flatlab.report import spectrum, tables, verdicts
from flatlab.report.panels import SOURCE, TARGET
from flatlab.specs.measurements import SpectrumSpec
from flatlab.specs.methods import METHODS, Labelled, replicates
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAQAT, FQAT = "GAQAT (our reading)", "FQAT (our reading)"
ROWS = {name: name for name in ("ERM", "SAGM", "LSQ", "LSQ+SAM", "LSQ+SAGM")}
ROWS |= {"SAQ": "LSQ+SAQ", GAQAT: "GAQAT", FQAT: "FQAT"}
FINE, COARSE, ABLATED = "4/4 bits", "3/3 bits", "ablations"
BITS = {FINE: 4, COARSE: 3}
MEASURES = {
    "source": "In-domain test (points)",
    "target": "Out of domain (points)",
    **fig3.AREAS,
    "highest, none": "Mean over γ of the sharpest source domain's F (nats)",
    "highest, filter": "Mean over ρ of the sharpest source domain's F (nats)",
    "ratio, none": "Sharpest source domain's F over the mean, γ",
    "ratio, filter": "Sharpest source domain's F over the mean, ρ",
    "top eigenvalue": "Top Hessian eigenvalue, source, inputs not rounded (nats)",
}
FROZEN = "frozen share"
FROZEN_SHARE = (
    "Share of the steps for which step sizes were frozen (mean over tensors, whatever their numbers of step sizes)"
)
MAPS = {
    "task": "Disorder of the task gradient",
    "between": "Conflict of task and perturbed loss",
    "frozen": "Share frozen",
}
KEYS = ["block", "measure", "method", "held_out", "seed"]
IMAGES = {"smoke": 8, "quick": 48, "paper": 256}  # of each domain, for the eigenvalue
SUMMARY = (
    "Differences paired by held-out domain and seed, 95 % intervals over seeds, each alone; * p < 0.05 after Holm over "
    "the pairs of a column within a block"
)
EIGENVALUE = (
    "Top eigenvalue: of the baked network whose layers' inputs are clipped to the range of their codes and not "
    "rounded, since with rounded inputs the loss is piecewise constant and has no curvature; for flatness the inputs "
    "are rounded."
)


@dataclass(frozen=True)
class Comparison:
    """One of the two figures: its comparisons of the common rows.

    Attributes:
        own: the row whose disorder is drawn and whose options are varied.
        baseline: the row with which all others are compared.
        further: more pairs: a row and the one that is subtracted.
        ablations: name -> changes of the setting.
        reading: sentences on the parts of the method that were found, and that are inferred.
        published: the paper's differences; None: none could be read.
    """

    own: str
    baseline: str
    further: tuple[tuple[str, str], ...]
    ablations: Mapping[str, Mapping[str, Any]]
    reading: str
    published: Callable[[], pd.DataFrame] | None = None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The rows whose differences are tested."""
        return [(row, self.baseline) for row in ROWS if row != self.baseline] + [*self.further]

    def pairs_of(self, block: str) -> list[tuple[str, str]]:
        """Return the pairs of a block; an ablation is compared with the unchanged method."""
        return [(name, self.own) for name in self.ablations] if block == ABLATED else self.pairs

    def runs(self, setting: Setting) -> dict[str, list[Labelled]]:
        """Return the runs of each block, each with its row's name."""
        last = setting.replace(held_out=setting.held_out[-1:])
        wide = {FINE: setting, COARSE: last}
        found = {
            block: [
                (row, run)
                for row, method in ROWS.items()
                for run in replicates(METHODS[method], one.replace(qat_bits=BITS[block]))
            ]
            for block, one in wide.items()
        }
        varied: dict[str, Mapping[str, Any]] = {self.own: {}, **self.ablations}
        method, base = METHODS[ROWS[self.own]], last.replace(qat_bits=BITS[FINE])
        ablated = [(row, run) for row, own in varied.items() for run in replicates(method, base.replace(**own))]
        return {**found, ABLATED: ablated}

    def labelled(self, setting: Setting) -> list[Labelled]:
        """Return each run with its row's name, and its block's if that is not the first."""
        return [
            (row if block == FINE else f"{row}, {block}", run)
            for block, runs in self.runs(setting).items()
            for row, run in runs
        ]

    def measured(self, setting: Setting) -> Measured:
        """Return the flatness and the top eigenvalue of each run except the ablations."""
        runs = self.runs(setting)
        return crossed([*runs[FINE], *runs[COARSE]], [*fig3.measurements(setting), curvature(setting)])

    def table(self, store: RunStore, setting: Setting) -> pd.DataFrame:
        """Return each measure of each run and over seeds; disorder by layer and step of the own row."""
        each, maps = [], []
        for block, runs in self.runs(setting).items():
            parts = [_accuracy(store, runs, setting), _frozen(store, runs)]
            if block != ABLATED:
                parts += [fig3.area_means(store, runs, setting), _eigenvalue(store, runs, setting)]
            each.append(pd.concat(parts, ignore_index=True).assign(block=block))
            if block == FINE:
                maps = [_disorder.along(store, [pair for pair in runs if pair[0] == self.own]).assign(block=block)]
        frame = pd.concat(each, ignore_index=True)[[*KEYS, "value"]]
        whole = [tables.over_seeds(frame, ["block", "measure", "method"])]
        whole += [tables.over_seeds(one, ["block", "measure", "method", "layer", "step"]) for one in maps]
        return pd.concat([frame.assign(over="run"), *whole], ignore_index=True).assign(comparable=False)

    def findings(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the differences of the pairs; a family of tests for each block and measure."""
        each = frame[(frame["over"] == "run") & frame["measure"].isin(MEASURES)]
        found = [
            tables.paired_each(mine, self.pairs_of(str(block)), ["measure"]).assign(block=block)
            for block, mine in each.groupby("block", sort=False)
        ]
        whole = pd.concat(found, ignore_index=True)
        return verdicts.corrected(whole, whole["block"] + ": " + whole["measure"].map(MEASURES))

    def remarks(self, frame: pd.DataFrame) -> list[str]:
        """Return sentences on the tests, the frozen shares, and the inferred parts of the method."""
        found = self.findings(frame)
        tests = [*verdicts.sentences(found), verdicts.statement(found)]
        return [*tests, *_frozen_shares(frame), EIGENVALUE, self.reading]

    def caption(self, setting: Setting) -> str:
        """Return title and notes: data, seeds, intervals."""
        own = self.own.split()[0]
        return (
            f"{own} (our reading): {setting.words}\n"
            f"4/4 bits (black): held out in turn {', '.join(setting.held_out)}; 3/3 bits (blue) and ablations (4/4 "
            f"bits): {setting.held_out[-1]} alone. Weights and layers' inputs are quantized from "
            f"{'the first step' if not setting.switch else f'step {setting.switch:,}'} on, except in ERM and SAGM; SAQ "
            f"is the method LSQ+SAQ. Differences paired by held-out domain and seed, bars: {setting.tested}. "
            f"F: {fig3.mean_rise(setting)}. Below, 4/4 bits: means over targets and seeds, between two evaluations; "
            "grey: no pair of signs. Checkpoint by training-domain validation."
        )

    def draw(self, frame: pd.DataFrame, caption: str) -> "Figure":
        """Draw the differences, those of the ablations, and the maps over layer and step."""
        import matplotlib.pyplot as plt

        found = self.findings(frame)
        panels = ("source", "target", "top eigenvalue", "source, none", "source, filter")
        with plots.style():
            figure, grid = plt.subplots(3, 3, figsize=(10.0, 8.4), layout="constrained", height_ratios=(1, 1, 0.55))
            for ax, measure in zip(grid[:2].flat, panels, strict=False):
                _differences(ax, found[found["measure"] == measure], self.pairs, (FINE, COARSE))
            for ax in (grid[0, 1], grid[0, 2], grid[1, 1]):
                ax.set_yticklabels([])
            ablated = found[found["measure"] == "target"]
            _differences(grid[1, 2], ablated, self.pairs_of(ABLATED), (ABLATED,))
            grid[1, 2].yaxis.tick_right()
            for ax, (measure, title) in zip(grid[2], MAPS.items(), strict=True):
                _map(ax, frame[(frame["measure"] == measure) & (frame["over"] == "seeds")], title)
            for ax in grid[2, 1:]:
                ax.set_yticklabels([])
            figure.colorbar(grid[2, 0].collections[0], ax=list(grid[2]), pad=0.01)
            plots.captioned(figure, grid[0, 0], caption)
        return figure

    def figure(self, module: str, doc: str) -> Analysis:
        """Return the figure."""
        return Analysis(
            module,
            doc,
            self.baseline,
            labelled=self.labelled,
            measured=self.measured,
            table=self.table,
            findings=once(self.findings),
            summary=summary,
            summary_title=SUMMARY,
            remarks=self.remarks,
            caption=self.caption,
            draw=from_table(self.draw),
            sheet=sheet,
            as_published=self.published,
            alone=True,
        )


def curvature(setting: Setting) -> SpectrumSpec:
    """Return the measurement of the top eigenvalue: few images and products."""
    effort: dict[str, Any] = {"k": 1, "tol": 0.05, "trace_budget": 32, "starts": 1, "steps": 3}
    return SpectrumSpec.make(images=IMAGES[setting.name], unrounded=True, **effort)


def _accuracy(store: RunStore, runs: list[Labelled], setting: Setting) -> pd.DataFrame:
    split = "test" if setting.test_share else "out"
    found = _percent.accuracies(store, runs, [(SOURCE, split), (TARGET, "in")])
    return found.assign(measure=found["panel"])


def _frozen(store: RunStore, runs: list[Labelled]) -> pd.DataFrame:
    """Return the share of the training steps for which step sizes were frozen, in percent, of the runs that freeze.

    It is the mean over tensors of step sizes, of which those of a layer's inputs hold one each.
    """
    freezing = [(row, run) for row, run in runs if run.step.freezing and not run.step.freezing.alternate]
    each = _disorder.along(store, freezing)
    mine = each[each["measure"] == "frozen"].assign(measure=FROZEN)
    steps = mine.groupby([*KEYS[1:], "layer"], sort=False)["step"].diff().fillna(mine["step"])
    mine = mine.assign(value=100 * mine["value"] * steps, steps=steps)
    sums = mine.groupby(KEYS[1:], sort=False)[["value", "steps"]].sum()
    return (sums["value"] / sums["steps"]).rename("value").reset_index()


def _eigenvalue(store: RunStore, runs: list[Labelled], setting: Setting) -> pd.DataFrame:
    found = spectrum.numbers(store, [(row, run, curvature(setting)) for row, run in runs])
    return found[(found["number"] == "eigenvalue") & (found["index"] == 0)].assign(measure="top eigenvalue")


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each block and pair, and a column for each measure."""
    return verdicts.by_measure(findings, MEASURES, ["block", "pair"])


def sheet(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each block and row: accuracies and frozen share, percent, ± standard error over seeds."""
    whole = frame[(frame["over"] == "seeds") & frame["measure"].isin(["source", "target", FROZEN])]
    cells = whole.assign(
        cell=[
            f"{value:.2f}" + (f" ± {error:.2f}" if np.isfinite(error) else "")
            for value, error in zip(whole["value"], whole["stderr"], strict=True)
        ]
    )
    wide = cells.pivot_table(index=["block", "method"], columns="measure", values="cell", aggfunc="first", sort=False)
    names = {"source": "in-domain test", "target": "out of domain", FROZEN: FROZEN}
    return wide[list(names)].rename(columns=names).fillna("").reset_index()


def _frozen_shares(frame: pd.DataFrame) -> list[str]:
    """Return a sentence on the frozen share of each block."""
    shares = frame[(frame["measure"] == FROZEN) & (frame["over"] == "seeds")]
    sentences = []
    for block, rows in shares.groupby("block", sort=False):
        listed = ", ".join(f"{row} {value:.1f}" for row, value in zip(rows["method"], rows["value"], strict=True))
        sentences.append(f"{FROZEN_SHARE}, {block}, percent: {listed}.")
    return sentences


def _differences(ax: "Axes", rows: pd.DataFrame, pairs: list[tuple[str, str]], blocks: tuple[str, ...]) -> None:
    """Draw the difference of each pair in one measure with its interval, the blocks beside each other."""
    for index, block in enumerate(blocks):
        mine = rows[rows["block"] == block].set_index(["method", "baseline"]).reindex(pairs)
        heights = np.arange(len(pairs)) + 0.3 * (index - (len(blocks) - 1) / 2)
        plots.intervals(ax, mine, heights, mine["p_holm"] < verdicts.LEVEL, color=("0.1", "C0")[index], label=block)
    ax.axvline(0, color="0.3", linewidth=0.8)
    alone = blocks == (ABLATED,)
    names = [row if alone else f"{row} − {base}" for row, base in pairs]
    ax.set(yticks=range(len(pairs)), yticklabels=names, ylim=(len(pairs) - 0.4, -0.6))
    ax.tick_params(axis="y", labelsize=6)
    ax.set_xlabel(MEASURES[rows["measure"].iloc[0]].replace("source, inputs", "source,\ninputs"))
    ax.set_title(f"{ABLATED.capitalize()}, less {pairs[0][1]}" if alone else "")
    ax.grid(visible=False, axis="y")
    ax.locator_params(axis="x", nbins=5)


def _map(ax: "Axes", rows: pd.DataFrame, title: str) -> None:
    """Draw a number from 0 to 1 for each step-size tensor (rows) and evaluation (columns)."""
    import seaborn as sns  # here: it takes seconds to load

    wide = rows.pivot(index="layer", columns="step", values="value").rename(columns=int)
    ax.set_facecolor(plots.BAD)
    sns.heatmap(wide, ax=ax, vmin=0, vmax=1, cmap="viridis", cbar=False, xticklabels=max(1, len(wide.columns) // 5))
    ax.set(xlabel="Training step", ylabel="", title=title)
    ax.tick_params(axis="y", labelsize=6, rotation=0)
