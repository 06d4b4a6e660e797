"""Plotting: one style for all figures, functions that draw a data frame, and files with embedded fonts."""

import io
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from cycler import cycler

from flatlab import files
from flatlab.arguments import FloatArray
from flatlab.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet
    from matplotlib.figure import Figure

MARKERS = "oXsDPv^*<>"
COLUMN = 3.4  # inches: the width of a paper's column
LINES = ("-", "--", ":", "-.")  # the next one after each ten colours
# seaborn's palette "colorblind", written out, since loading seaborn takes a third of the time of drawing a figure.
PALETTE = ["#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9"]
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=PALETTE),
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
    "pdf.fonttype": 42,  # TrueType fonts are embedded; text can be selected
    "savefig.dpi": 200,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in flatlab's style, whatever a matplotlibrc says: a paper's small type, colours for colour-blind readers."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def curves(ax: "Axes", frame: pd.DataFrame, *, x: str, by: str, order: Sequence[str]) -> None:
    """Draw one line with markers and a band (`low` to `high`) for each value of a column.

    Args:
        ax: the axes.
        frame: rows with x, `value`, `low`, `high` and the column `by`.
        x: the column of the horizontal axis.
        by: the column that distinguishes the lines.
        order: its values; fixes colours and markers across figures.
    """
    for index, name in enumerate(order):
        rows = frame[frame[by] == name].sort_values(x)
        if rows.empty:
            continue
        look: dict[str, Any] = {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
        (line,) = ax.plot(rows[x], rows["value"], **look, linestyle=LINES[index // 10 % len(LINES)], label=name)
        ax.fill_between(rows[x], rows["low"], rows["high"], color=line.get_color(), alpha=0.18, linewidth=0)


def valley(ax: "Axes", losses: Mapping[int, float], found: Mapping[str, Any], *, index: int = 0) -> None:
    """Draw a validation loss (nats) on a logarithmic axis, its valley shaded, the threshold dashed (Cha et al. 2021).

    Args:
        ax: the axes.
        losses: by step.
        found: start and end (steps) and threshold (nats) of the valley; without a valley, start is None or absent.
        index: of the colour and marker.
    """
    color = f"C{index % 10}"
    ax.plot(list(losses), list(losses.values()), color=color, marker=MARKERS[index % len(MARKERS)])
    if found.get("start") is not None:
        ax.axvspan(found["start"], found["end"], color=color, alpha=0.15, linewidth=0)
        ax.axhline(found["threshold"], color=color, linestyle="--", linewidth=0.8)
    ax.set(yscale="log")


def legend_above(figure: "Figure", ax: "Axes", title: str, *, columns: int | None = None) -> None:
    """Put one legend for all panels above them, under a title, in one row or in some columns."""
    handles, labels = ax.get_legend_handles_labels()
    where: dict[str, Any] = {"loc": "outside upper center", "ncols": columns or len(labels)}
    legend = figure.legend(handles, labels, **where, title=title, title_fontsize=9)
    legend.get_title().set_multialignment("center")


def rendered(figure: "Figure") -> dict[str, bytes]:
    """Return a figure as PDF and PNG, by suffix, and close it; the PDF has no date, so that equal figures are equal."""
    import matplotlib.pyplot as plt

    contents = {}
    with style():  # resolution and fonts are those at the time of writing
        try:
            for suffix, metadata in ((".pdf", {"CreationDate": None}), (".png", None)):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix[1:], metadata=metadata)
                contents[suffix] = buffer.getvalue()
                figure.set_layout_engine("none")  # the second picture has the layout of the first
        finally:
            plt.close(figure)
    return contents


def save(figure: "Figure", stem: Path, table: pd.DataFrame | None = None) -> list[Path]:
    """Write `<stem>.pdf` and `<stem>.png`, and a table that belongs to the figure to `<stem>.csv`."""
    contents = rendered(figure)
    if table is not None:
        contents[".csv"] = table.to_csv(index=False).encode()
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in contents.items():
        files.write_bytes(stem.with_suffix(suffix), content)
    return [stem.with_suffix(suffix) for suffix in contents]


def forest(
    left: pd.DataFrame, right: pd.DataFrame, *, order: Sequence[str], axes: tuple[str, str], caption: str
) -> "Figure":
    """Draw two panels of dots with intervals for each value of `row`: quantities, and differences to the first line.

    Args:
        left: rows with `row`, `method`, `value`, `low`, `high`, `published`, and `comparable`: whether the published
            value may be shown on our axis.
        right: the same for the differences.
        order: the methods, from top to bottom; the first has no difference.
        axes: names of the two axes.
        caption: title, line feed, notes.
    """
    import matplotlib.pyplot as plt

    titles = list(left["row"].drop_duplicates())
    height = 0.9 + len(titles) * (0.55 + 0.17 * len(order))
    with style():
        figure, grid = plt.subplots(
            len(titles), 2, figsize=(COLUMN, height), layout="constrained", sharey="row", squeeze=False
        )
        for title, (at, less) in zip(titles, grid, strict=True):
            for ax, frame in ((at, left), (less, right)):
                dots(ax, frame[frame["row"] == title], order)
            at.set_title(textwrap.fill(title, round(COLUMN * 14)), loc="left")
            less.axvline(0, color="0.3", linewidth=0.8)
        for ax, name in zip(grid[-1], axes, strict=True):
            ax.set_xlabel(name)
        captioned(figure, grid[0, 0], caption)
    return figure


def captioned(
    figure: "Figure", ax: "Axes | None", caption: str, *, columns: int | None = None, fontsize: float = 5.5
) -> None:
    """Place title and legend above all panels, and the notes below, wrapped to the width of the figure.

    Args:
        figure: the figure.
        ax: the axes whose legend is shown; None: no legend.
        caption: title, line feed, notes.
        columns: of the legend; one row if not given.
        fontsize: of the notes.
    """
    title, notes = title_and_notes(caption)
    title = textwrap.fill(title, round(figure.get_figwidth() * 14))  # at 9 points
    if ax is None:
        figure.suptitle(title, fontsize=9)
    else:
        legend_above(figure, ax, title, columns=columns)
    lines = [textwrap.fill(line, round(figure.get_figwidth() * 121 / fontsize)) for line in notes.split("\n")]
    figure.supxlabel("\n".join(lines), fontsize=fontsize, color="0.3")


def title_and_notes(caption: str) -> tuple[str, str]:
    """Return the two parts of a caption: its first line, and the rest."""
    title, _, notes = caption.partition("\n")
    return title, notes


def dots(ax: "Axes", frame: pd.DataFrame, order: Sequence[str]) -> None:
    """Draw a dot with its interval for each method, and the published value as an open diamond if it is comparable.

    Args:
        ax: the axes; the vertical one is that of the methods.
        frame: rows with `method`, `value`, `low`, `high`, `published`, `comparable`.
        order: the methods, from top to bottom.
    """
    rows = frame.set_index("method").reindex(list(order))
    heights = np.arange(len(order))
    ax.hlines(heights, rows["low"], rows["high"], color="C0", linewidth=1.2)
    which = "ours, 95 % over seeds" if rows["low"].notna().any() else "ours, no interval"
    ax.plot(rows["value"], heights, "o", color="C0", label=which)
    if rows["comparable"].eq(True).any():
        shown = rows["published"].where(rows["comparable"].eq(True))
        ax.plot(shown, heights, "D", color="C1", markerfacecolor="none", label="published")
    ax.set(yticks=heights, yticklabels=order, ylim=(len(order) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)


def intervals(
    ax: "Axes", rows: pd.DataFrame, heights: npt.NDArray[np.floating[Any]], significant: "pd.Series[bool]", **look: Any
) -> None:
    """Draw a dot with its interval for each row, filled if significant.

    Args:
        ax: the axes.
        rows: `value`, `low` and `high`.
        heights: positions on the vertical axis.
        significant: of each row.
        look: color and label.
    """
    ax.hlines(heights, rows["low"], rows["high"], color=look["color"], linewidth=1.1)
    ax.plot(rows["value"], heights, "o", markerfacecolor="white", **look)
    ax.plot(rows["value"][significant], heights[significant.to_numpy()], "o", color=look["color"])


def _halo() -> list[Any]:
    """Return the effect that keeps text legible on contours: a white outline."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.5, foreground="white")]


CORNERS = ((4, 4), (-4, 4), (4, -4), (-4, -4))  # offsets of a name from its marked point, in typographic points
BAD = "0.8"  # colour of values that are not finite
DECADES = 6.0  # largest span of the contours, below the highest one


def contour_levels(surfaces: Iterable[FloatArray], count: int = 12, *, log: bool = True) -> FloatArray:
    """Return contour levels for all these surfaces, evenly spaced in the logarithm if all values are positive."""
    finite = np.concatenate([each[np.isfinite(each)] for each in surfaces])
    if not len(finite) or finite.min() == finite.max():
        middle = float(finite[0]) if len(finite) else 0.0
        return np.array([middle - 1.0, middle + 1.0])
    low, high = float(finite.min()), float(finite.max())
    if log and low > 0:
        return np.asarray(np.geomspace(max(low, high * 10.0**-DECADES), high, count))
    return np.linspace(low, high, count)


def contours(
    ax: "Axes", places: tuple[FloatArray, FloatArray], values: FloatArray, *, levels: FloatArray
) -> "QuadContourSet":
    """Draw values (n1, n2) at places x (n1,), y (n2,): filled, with labelled lines; grey where not finite.

    Args:
        ax: the axes.
        places: coordinates of the grid's lines, in true units.
        values: row i is x[i].
        levels: contour levels, common to the panels that are to be compared.
    """
    shown = np.ma.masked_invalid(values.T)
    ax.set_facecolor(BAD)
    look: dict[str, Any] = {"levels": levels}
    filled = ax.contourf(*places, shown, cmap="viridis", norm=_norm(levels), extend="both", alpha=0.9, **look)
    lines = ax.contour(*places, shown, colors="k", linewidths=0.4, **look)
    for text in ax.clabel(lines, levels[1::2].tolist(), fontsize=6, fmt=lambda level: f"{level:.2g}"):
        text.set_path_effects(_halo())
    ax.grid(visible=False)
    return filled


def relief(ax: Any, places: tuple[FloatArray, FloatArray], values: FloatArray, *, levels: FloatArray) -> None:
    """Draw the same values as a relief on 3-D axes; its height is logarithmic if the levels are positive."""
    log = bool(levels[0] > 0)
    height = np.log10(np.maximum(values, levels[0])) if log else values
    ends = np.log10(levels[[0, -1]]) if log else levels[[0, -1]]
    x, y = np.meshgrid(*places, indexing="ij")
    ax.plot_surface(x, y, np.where(np.isfinite(height), height, np.nan), cmap="viridis", vmin=ends[0], vmax=ends[1])
    ax.set_zlim(*ends)
    ax.set_zlabel("loss (nats)", fontsize=7)
    if log:
        ax.zaxis.set_major_formatter(lambda z, _: f"{10**z:.2g}")


def marked(ax: "Axes", marks: FloatArray, names: Sequence[str], *, connected: bool = False) -> None:
    """Draw points (K, 2) of the plane with their names; if connected, as a path with names at its ends."""
    if not len(marks):
        return
    ax.plot(*marks.T, "-o" if connected else "o", color="C3", ms=3, lw=1, mec="white", mew=0.5, zorder=5)
    shown = range(len(marks)) if not connected else (0, len(marks) - 1)
    for index in shown:
        _beside(ax, marks[index], names[index])


def _beside(ax: "Axes", point: Any, name: str) -> None:
    """Write a name beside a point, at the first offset where it covers no other text, such as a contour's label."""
    others = [text.get_window_extent() for text in ax.texts]
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "path_effects": _halo(), "zorder": 6}
    text = ax.annotate(name, point, CORNERS[0], **look)
    for right, up in CORNERS:
        text.set(position=(right, up), ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top")
        if not any(text.get_window_extent().overlaps(each) for each in others):
            return
    text.set(position=CORNERS[0], ha="left", va="bottom")


def _norm(levels: FloatArray) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    kind = LogNorm if levels[0] > 0 and levels[-1] / levels[0] > 10 else Normalize
    return kind(float(levels[0]), float(levels[-1]))


def plotly() -> Any:
    """Return plotly's graph objects (extra `report`).

    Raises:
        UserError: where the package is not installed.
    """
    if find_spec("plotly") is None:
        raise UserError("Interactive pictures need plotly, which is not installed: pip install 'flatlab[report]'.")
    return import_module("plotly.graph_objects")


def bands(curves: Mapping[str, tuple[FloatArray, FloatArray, FloatArray, FloatArray]], *, axes: tuple[str, str]) -> Any:
    """Return an interactive picture of lines with bands.

    Args:
        curves: name -> places, values, and the ends of the intervals (low, high), each (n,).
        axes: names of the two axes.
    """
    go = plotly()
    figure = go.Figure()
    for index, (name, (places, values, low, high)) in enumerate(curves.items()):
        colour = PALETTE[index % len(PALETTE)]
        around = {"x": np.concatenate([places, places[::-1]]), "y": np.concatenate([high, low[::-1]])}
        shared = {"legendgroup": name, "name": name}
        hidden = {"mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
        figure.add_scatter(**around, **hidden, **shared, fill="toself", fillcolor=colour, opacity=0.25)
        figure.add_scatter(x=places, y=values, mode="lines+markers", line_color=colour, **shared)
    return figure.update_layout(xaxis_title=axes[0], yaxis_title=axes[1], template="plotly_white")


def turning(
    places: tuple[FloatArray, FloatArray],
    values: FloatArray,
    *,
    marks: tuple[FloatArray, Sequence[str]],
    connected: bool,
    axes: tuple[str, str, str],
) -> Any:
    """Return a surface that can be rotated, with its marks; on a logarithmic axis where the values span a decade.

    Args:
        places: x (n1,), y (n2,).
        values: (n1, n2); gaps where they are not finite.
        marks: points (K, 2) of the plane, and their names.
        connected: whether these are a path.
        axes: names of the three axes.
    """
    from scipy.interpolate import RegularGridInterpolator

    go = plotly()
    shown = np.where(np.isfinite(values), values, np.nan)
    log = bool(np.nanmin(shown) > 0 and np.nanmax(shown) > 10 * np.nanmin(shown))
    figure = go.Figure(go.Surface(x=places[0], y=places[1], z=shown.T, colorscale="Viridis", colorbar_title=axes[2]))
    if len(marks[0]):
        inside = np.clip(marks[0], [each.min() for each in places], [each.max() for each in places])
        height = RegularGridInterpolator(places, shown)(inside)
        mode = "lines+markers" if connected else "markers"
        where = dict(zip("xyz", (*marks[0].T, height), strict=True))
        look: dict[str, Any] = {"marker": {"size": 4, "color": "crimson"}, "line_color": "crimson", "name": "marks"}
        figure.add_scatter3d(**where, mode=mode, text=list(marks[1]), **look)
    scene = {f"{axis}axis_title": name for axis, name in zip("xyz", axes, strict=True)}
    scene |= {"zaxis_type": "log" if log else "linear"}
    return figure.update_layout(scene=scene, height=600, margin=dict.fromkeys("lrtb", 20), template="plotly_white")
