"""`flatlab replay`: accuracy of averages of kept checkpoints and of the run's own, as a table and a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatlab import plots
from flatlab.report import tables, valleys
from flatlab.store import selection
from flatlab.store.runs import Run

OWN = "as trained"
SHOWN = {"run": "", "average": "", "held_out": "", "steps": "", "validation": ".3f", "validation_loss": ".4f"}
SHOWN |= {"test": ".3f", "target": ".3f"}


def chart(found: Sequence[Run], replays: Sequence[Any], *, out: Path) -> tuple[pd.DataFrame, list[str], list[Path]]:
    """Tabulate and draw replayed averages; write `replay.{csv,pdf,png}`.

    Args:
        found: the runs.
        replays: of each run (`train.replay.Replay`).
        out: folder of the pictures.

    Returns:
        A row for each run and average, the run's own selected checkpoint first; sentences; the written files.
    """
    pairs = list(zip(found, replays, strict=True))
    table = pd.DataFrame([row for run, each in pairs for row in _rows(run, each)])
    written = plots.save(_draw(pairs, table), out / "replay", table)
    return table, [sentence for run, each in pairs for sentence in _sentences(run, each)], written


def _rows(run: Run, replay: Any) -> Iterator[dict[str, Any]]:
    own = selection.training_domain(selection.candidates(run.rows(), run.spec.settled))
    lines = {OWN: (own, {"first": own["step"], "last": own["step"], "every": 1}, f"at {own['step']}")}
    for name, each in replay.averages.items():
        span = {"first": each.first, "last": each.last, "every": each.every}
        lines[name] = each.row, span, f"{each.first} to {each.last}, each {replay.every}"
    for name, (row, span, steps) in lines.items():
        yield {
            **{"run": run.name, "average": name, "held_out": run.spec.held_out, "seed": run.spec.seed, "steps": steps},
            **{field: row[field] for field in ("validation", "validation_loss")},
            **{"test": tables.tested(row), "target": selection.target_accuracy(row), **span},
        }


def _sentences(run: Run, replay: Any) -> Iterator[str]:
    if replay.every > 1:
        yield (
            f"{run.name}: averages are of the checkpoints that were kept, each {replay.every} steps; "
            "in training they would be of more."
        )
    for name, each in replay.averages.items():
        if each.valley:
            yield f"{run.name}, {name}: {valleys.sentence(each.valley, each.rule)}"


def _draw(pairs: Sequence[tuple[Run, Any]], table: pd.DataFrame) -> Figure:
    with plots.style():
        size = (max(plots.COLUMN, 2.6 * len(pairs)), 3.6)
        figure, axes = plt.subplots(2, len(pairs), figsize=size, layout="constrained", sharex="col", squeeze=False)
        for (above, below), (run, replay) in zip(axes.T, pairs, strict=True):
            valley: dict[str, Any] = next((each.valley for each in replay.averages.values() if each.valley), {})
            plots.valley(above, replay.losses, valley)
            above.set(ylabel="Validation loss (nats)", title=f"{run.name}, held out: {run.spec.target}")
            _spans(below, table[table["run"] == run.name])
        for ax in axes[:, 1:].ravel():
            ax.set_ylabel("")
        title = "Shaded: SWAD's valley; dashed: its threshold.\nBelow: what is averaged; right: held-out accuracy"
        figure.suptitle(title, fontsize=8)
    return figure


def _spans(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw the steps of each average, and its accuracy on the held-out domain beside it."""
    for place, row in enumerate(rows.to_dict("records")):
        look: Mapping[str, Any] = {"color": f"C{place}", "marker": plots.MARKERS[place], "linewidth": 2}
        ax.plot([row["first"], row["last"]], [place, place], **look)
    heights = range(len(rows))
    ax.set(yticks=heights, yticklabels=rows["average"], ylim=(len(rows) - 0.5, -0.5), xlabel="Training step")
    right = ax.secondary_yaxis("right")
    right.set_yticks(heights, [f"{100 * value:.1f} %" for value in rows["target"]])
    right.spines["right"].set_visible(False)
    for each in (ax, right):
        each.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
