"""Stability of the accuracy on the held-out domain along a training: curves, and numbers.

The paper shows curves (QT-DoG Fig. 4); the numbers are ours: `spread` and `change` measure its variation, `correlation`
its agreement with validation, and `regret` the cost of selecting by validation.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.errors import UserError
from flatlab.report import tables
from flatlab.report.panels import ACCURACY, SOURCE, TARGET
from flatlab.results.stability import stability
from flatlab.specs.methods import Labelled, name_of
from flatlab.specs.run import RunSpec
from flatlab.store import selection
from flatlab.store.runs import Run, RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTITIES = {"test": ACCURACY[SOURCE, "test"], "validation": ACCURACY[SOURCE, "out"], "target": ACCURACY[TARGET, "in"]}
NUMBERS = {
    "spread": "Standard deviation",
    "change": "Mean absolute change",
    "correlation": "Spearman with validation",
    "regret": "Regret of selection",
}
SETTLED = 0.1  # of the steps: earlier accuracies rise from chance, and would set the scale of the axis
KEYS = ["quantity", "method", "held_out", "seed", "step"]
SHOWN = {"method": "", "held_out": "", "seed": "", "points": "", **dict.fromkeys(NUMBERS, ".2f")}
UNITLESS = "correlation"  # the other numbers are shares of 1, given in percent


def curves(store: RunStore, wanted: Iterable[Labelled]) -> pd.DataFrame:
    """Return one row per run, evaluation and quantity: accuracy (shares of 1), from the runs' logs.

    Quantities are "validation", "target" and, if the run has a test split, "test".

    Args:
        store: contains the finished runs.
        wanted: method's name, run.

    Raises:
        UserError: if a run is not finished.
    """
    return pd.DataFrame([row for label, spec in wanted for row in _points(store.run(spec), label)])


def _points(run: Run, label: str) -> Iterable[dict[str, Any]]:
    if not run.done:
        raise UserError(f"Run {run.spec.digest} ({label}, {run.spec.target}) is not trained yet.")
    if not run.spec.target_logged:
        raise UserError(
            f"Run {run.spec.digest} ({label}) was trained with --no-target, so that its log lacks the held-out domain; "
            "train it without that option."
        )
    for row in run.rows():
        values = {"test": tables.tested(row), "validation": row["validation"]}
        values["target"] = selection.target_accuracy(row)
        for quantity, value in values.items():
            if np.isnan(value):
                continue
            keys = (quantity, label, run.spec.held_out, run.spec.seed, row["step"])
            yield {**dict(zip(KEYS, keys, strict=True)), "value": value}


def numbers(curves: pd.DataFrame, since: int) -> pd.DataFrame:
    """Return one row per method, held-out domain and seed: the numbers over the evaluations from a step on.

    Args:
        curves: as `curves` returns them.
        since: the first step included, the same for all: that of the switch.
    """
    late = curves[curves["step"] >= since]
    rows = []
    for keys, group in late.groupby(["method", "held_out", "seed"], sort=False):
        series = group.pivot(index="step", columns="quantity", values="value").sort_index()
        found = stability(series["validation"], series["target"])
        rows.append({**dict(zip(["method", "held_out", "seed"], keys, strict=True)), **vars(found)})
    return pd.DataFrame(rows)


def switch_of(runs: Sequence[RunSpec]) -> int:
    """Return the latest switch of some runs, from which all are compared; 0 if none has one."""
    return max(spec.switch or 0 for spec in runs)


def chart(
    store: RunStore, found: list[Run], *, since: int, out: Path, valleys: Sequence[dict[str, Any]] = ()
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw any runs; write `stability.{csv,pdf,png}`.

    Args:
        store: contains them.
        found: the runs, finished.
        since: the first step included.
        out: folder of the pictures.
        valleys: SWAD's of each run, drawn in a separate panel.
    """
    import matplotlib.pyplot as plt

    for run in found:
        if len(selection.candidates(run.rows(), since)) < 3:
            raise UserError(
                f"Run {run.spec.digest} ({name_of(run.spec)}) has fewer than three evaluations from step {since} on, "
                "so that there is no curve: give runs with average last or sma, an earlier --since, or train with a "
                "smaller --eval-every."
            )
    along = curves(store, [(run.name, run.spec) for run in found])
    frame = along.assign(low=along["value"], high=along["value"])
    with plots.style():
        rows = 3 if valleys else 2
        figure, axes = plt.subplots(rows, 1, figsize=(3.4, 2.1 * rows), layout="constrained", sharex=True)
        panels(axes[:2], frame, list(dict.fromkeys(frame["method"])), since)
        if valleys:
            _valleys(axes[2], found, valleys)
        plots.legend_above(figure, axes[0], "")
    table = numbers(along, since)
    table[list(NUMBERS)] *= [1 if name == UNITLESS else 100 for name in NUMBERS]
    if valleys:
        table = table.join(pd.DataFrame(list(valleys)).drop(columns="span").add_prefix("valley "))
    return table, plots.save(figure, out / "stability", along)


def _valleys(ax: "Axes", found: Sequence[Run], valleys: Sequence[dict[str, Any]]) -> None:
    """Draw the validation loss of runs, their valleys shaded, the thresholds dashed."""
    for index, (run, valley) in enumerate(zip(found, valleys, strict=True)):
        plots.valley(ax, {row["step"]: row["validation_loss"] for row in run.rows()}, valley, index=index)
    ax.set(xlabel="Training step", ylabel="Validation loss (nats)")
    ax.set_title("SWAD's valley (shaded) and its threshold (dashed)", fontsize=7)


def panels(axes: "Sequence[Axes]", frame: pd.DataFrame, order: Sequence[str], since: int) -> None:
    """Draw accuracy on the source domains above and on the held-out domain below against the step, the switch marked.

    Args:
        axes: two, from top to bottom.
        frame: rows with `quantity`, `method`, `step`, `value`, `low`, `high`.
        order: the methods.
        since: the step of the switch; 0 is not marked.
    """
    there = [name for name in QUANTITIES if name in set(frame["quantity"])]
    for ax, quantity in zip(axes, (there[0], "target"), strict=True):  # the test split, if there is one
        name = QUANTITIES[quantity]
        mine = frame[frame["quantity"] == quantity]
        plots.curves(ax, mine, x="step", by="method", order=order)
        settled = mine[mine["step"] >= SETTLED * mine["step"].max()]
        ax.set_ylim(bottom=max(0.0, settled["low"].min() - 0.02), top=min(1.0, settled["high"].max() + 0.02))
        if since:
            ax.axvline(since, color="0.3", linewidth=0.8, linestyle=":")
        ax.set(ylabel=name.replace(", ", ",\n") + " (%)")
        ax.yaxis.set_major_formatter(_percent)
    axes[-1].set(xlabel="Training step" + (f"\n(dotted: switch at {since})" if since else ""))


def _percent(share: float, _: float) -> str:
    """Return the label of a tick: PercentFormatter would round 0.75 % to 0.8."""
    return f"{100 * share:g}"


def dots(figure: Any, frame: pd.DataFrame, order: Sequence[str]) -> None:
    """Draw each number with its interval, one panel for each number, one line for each method.

    Args:
        figure: or a part of one.
        frame: rows with `quantity`, `method`, `value`, `low`, `high`.
        order: the methods, from top to bottom.
    """
    for ax, (quantity, name) in zip(figure.subplots(len(NUMBERS), 1), NUMBERS.items(), strict=True):
        rows = frame[frame["quantity"] == quantity].set_index("method").reindex(list(order))
        for place, method in enumerate(order):
            look: dict[str, Any] = {"color": f"C{place}"}
            ax.hlines(place, rows.loc[method, "low"], rows.loc[method, "high"], **look)
            ax.plot(rows.loc[method, "value"], place, plots.MARKERS[place], **look)
        unit = "" if quantity == "correlation" else " (%)"
        if unit:
            ax.xaxis.set_major_formatter(_percent)
        ax.set(yticks=range(len(order)), yticklabels=order, ylim=(len(order) - 0.5, -0.5))
        ax.set_xlabel(f"{name}{unit}", fontsize=7)
        ax.locator_params(axis="x", nbins=4)
        ax.grid(visible=False, axis="y")


def picture(frame: pd.DataFrame, order: Sequence[str], caption: str) -> "Figure":
    """Draw Figure 4: a column of curves for each held-out domain, and the numbers beside them.

    Args:
        frame: rows over seeds: curves, and numbers where `step` is missing; `switch` on each.
        order: the methods.
        caption: title, line feed, notes.
    """
    import matplotlib.pyplot as plt

    along, table = frame[frame["step"].notna()], frame[frame["step"].isna() & (frame["held_out"] == "all")]
    targets = list(dict.fromkeys(along["held_out"]))
    with plots.style():
        figure = plt.figure(figsize=(7.0, 3.9 + 0.25 * (len(order) - 2)), layout="constrained")
        left, right = list(figure.subfigures(1, 2, width_ratios=[len(targets), 1]))  # type: ignore[arg-type]
        grid = left.subplots(2, len(targets), sharex=True, sharey="row", squeeze=False)
        for column, target in zip(grid.T, targets, strict=True):
            panels(column, along[along["held_out"] == target], order, int(frame["switch"].iloc[0]))
            column[0].set_title(f"Held out: {target}")
        for ax in grid[:, 1:].ravel():
            ax.set_ylabel("")
        dots(right, table, order)
        plots.captioned(figure, grid[0, 0], caption, fontsize=6.5)
    return figure
