"""From frames to figures: one style for all, marks that take a frame, and files with embedded fonts."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = "oXsDPv^*<>"
COLUMN = 3.4  # inches: the width of a paper's column
LINES = ("-", "--", ":", "-.")  # where the ten colours are used up
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # fonts are embedded as outlines that stay text
    "savefig.dpi": 200,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in flatlab's style: small type for a paper's column, a palette that the colour-blind can read."""
    with mpl.rc_context({**STYLE, "axes.prop_cycle": cycler(color=sns.color_palette("colorblind"))}):
        yield


def curves(ax: Axes, frame: pd.DataFrame, *, x: str, by: str, order: Sequence[str]) -> None:
    """Draw one line with markers and a band (`low` to `high`) for each value of a column.

    Args:
        ax: the axes.
        frame: rows with x, `value`, `low`, `high` and the column `by`.
        x: the column of the horizontal axis.
        by: the column that tells the lines apart.
        order: its values, which fixes colours and markers from figure to figure.
    """
    for index, name in enumerate(order):
        rows = frame[frame[by] == name].sort_values(x)
        if rows.empty:
            continue
        look: dict[str, Any] = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
        (line,) = ax.plot(rows[x], rows["value"], **look, linestyle=LINES[index // 10 % len(LINES)], label=name)
        ax.fill_between(rows[x], rows["low"], rows["high"], color=line.get_color(), alpha=0.18, linewidth=0)


def bars(ax: Axes, frame: pd.DataFrame, *, x: str, by: str, order: Sequence[str]) -> None:
    """Draw a thin line with markers and staggered error bars for each value of a column: bands cover each other.

    Args:
        ax: the axes.
        frame: rows with x, `value`, `low`, `high` and the column `by`.
        x: the column of the horizontal axis.
        by: the column that tells the lines apart.
        order: its values, which fixes colours and markers from figure to figure.
    """
    step = 0.008 * (frame[x].max() - frame[x].min())
    for index, name in enumerate(order):
        rows = frame[frame[by] == name].sort_values(x)
        color, marker = f"C{index % 10}", MARKERS[index % len(MARKERS)]
        ax.plot(rows[x], rows["value"], color=color, marker=marker, markersize=3, linewidth=0.9, label=name)
        aside = rows[x] + step * (index - (len(order) - 1) / 2)
        ax.vlines(aside, rows["low"], rows["high"], color=color, linewidth=0.8, alpha=0.7)


def valley(ax: Axes, losses: Mapping[int, float], found: Mapping[str, Any], *, index: int = 0) -> None:
    """Draw a validation loss (nats) on a logarithmic axis, its valley shaded, the threshold dashed (Cha et al. 2021).

    Args:
        ax: the axes.
        losses: by step.
        found: start and end (steps) and threshold (nats) of the valley; of none, start is None or absent.
        index: of the colour and marker.
    """
    color = f"C{index % 10}"
    ax.plot(list(losses), list(losses.values()), color=color, marker=MARKERS[index % len(MARKERS)])
    if found.get("start") is not None:
        ax.axvspan(found["start"], found["end"], color=color, alpha=0.15, linewidth=0)
        ax.axhline(found["threshold"], color=color, linestyle="--", linewidth=0.8)
    ax.set(yscale="log")


def legend_above(figure: Figure, ax: Axes, title: str) -> None:
    """Put one legend for all panels above them, under a title."""
    handles, labels = ax.get_legend_handles_labels()
    where: dict[str, Any] = {"loc": "outside upper center", "ncols": len(labels)}
    legend = figure.legend(handles, labels, **where, title=title, title_fontsize=9)
    legend.get_title().set_multialignment("center")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.pdf` and `<stem>.png`; the PDF carries no date, so that equal figures are equal files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".pdf", ".png")]
    with style():  # resolution and fonts are chosen on writing
        for path in paths:
            figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths


def forest(
    left: pd.DataFrame, right: pd.DataFrame, *, order: Sequence[str], axes: tuple[str, str], caption: str
) -> Figure:
    """Draw two panels of dots with intervals for each value of `row`: quantities, and differences to the first line.

    Args:
        left: rows with `row`, `method`, `value`, `low`, `high`, `published`, and `comparable`, which says where the
            published value may stand on our axis.
        right: the same of the differences.
        order: the methods, from top to bottom; the first has no difference.
        axes: names of the two axes.
        caption: title, line feed, small print.
    """
    titles = list(left["row"].drop_duplicates())
    height = 0.9 + len(titles) * (0.55 + 0.17 * len(order))
    with style():
        figure, grid = plt.subplots(
            len(titles), 2, figsize=(COLUMN, height), layout="constrained", sharey="row", squeeze=False
        )
        for title, (at, less) in zip(titles, grid, strict=True):
            for ax, frame in ((at, left), (less, right)):
                dots(ax, frame[frame["row"] == title], order)
            at.set_title(title, loc="left")
            less.axvline(0, color="0.3", linewidth=0.8)
        for ax, name in zip(grid[-1], axes, strict=True):
            ax.set_xlabel(name)
        captioned(figure, grid[0, 0], caption)
    return figure


def captioned(figure: Figure, ax: Axes, caption: str) -> None:
    """Put title and legend above all panels, and the small print below, wrapped to the width of the figure.

    Args:
        figure: the figure.
        ax: whose legend is shown.
        caption: title, line feed, small print.
    """
    title, _, rest = caption.partition("\n")
    legend_above(figure, ax, "\n".join(textwrap.wrap(title, round(figure.get_figwidth() * 14))))  # at 9 points
    characters = round(figure.get_figwidth() * 22)  # at 5.5 points
    figure.supxlabel("\n".join(textwrap.wrap(rest, characters)), fontsize=5.5, color="0.3")


def dots(ax: Axes, frame: pd.DataFrame, order: Sequence[str]) -> None:
    """Draw a dot with its interval for each method, and the published value as an open diamond where it is comparable.

    Args:
        ax: the axes; methods stand on its vertical axis.
        frame: rows with `method`, `value`, `low`, `high`, `published`, `comparable`.
        order: the methods, from top to bottom.
    """
    rows = frame.set_index("method").reindex(list(order))
    heights = np.arange(len(order))
    ax.hlines(heights, rows["low"], rows["high"], color="C0", linewidth=1.2)
    ax.plot(rows["value"], heights, "o", color="C0", label="ours, 95 % over seeds")
    if rows["comparable"].eq(True).any():
        shown = rows["published"].where(rows["comparable"].eq(True))
        ax.plot(shown, heights, "D", color="C1", markerfacecolor="none", label="published")
    ax.set(yticks=heights, yticklabels=order, ylim=(len(order) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
