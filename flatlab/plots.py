"""From frames to figures: one style for all, marks that take a frame, and files with embedded fonts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MARKERS = "oXsDPv^*<>"
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


def legend_above(figure: Figure, ax: Axes, title: str) -> None:
    """Put one legend for all panels above them, under a title."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title=title, title_fontsize=9)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `<stem>.pdf` and `<stem>.png`; the PDF carries no date, so that equal figures are equal files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".pdf", ".png")]
    with style():  # resolution and fonts are chosen on writing
        for path in paths:
            figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths
