"""Drawings of surfaces (contours, relief, what lies in the plane) and of audits. Numbers in, marks out; no torch."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.patheffects as effects
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet

FloatArray = npt.NDArray[np.float64]
HALO: list[effects.AbstractPathEffect] = [effects.withStroke(linewidth=1.5, foreground="white")]
ENDS = ("low", "high")
BAD = "0.8"  # where the number is not finite
DECADES = 6.0  # that contours span at most, below the highest


def contour_levels(surfaces: Iterable[FloatArray], count: int = 12, *, log: bool = True) -> FloatArray:
    """Return levels that fit all these surfaces, evenly spaced in the logarithm where all values are positive."""
    finite = np.concatenate([each[np.isfinite(each)] for each in surfaces])
    if not len(finite) or finite.min() == finite.max():
        middle = float(finite[0]) if len(finite) else 0.0
        return np.array([middle - 1.0, middle + 1.0])
    low, high = float(finite.min()), float(finite.max())
    if log and low > 0:
        return np.asarray(np.geomspace(max(low, high * 10.0**-DECADES), high, count))
    return np.linspace(low, high, count)


def contours(
    ax: Axes, places: tuple[FloatArray, FloatArray], values: FloatArray, *, levels: FloatArray, label: bool = True
) -> QuadContourSet:
    """Draw values (n1, n2) at places x (n1,), y (n2,): filled, with labelled lines; grey where not finite.

    Args:
        ax: the axes.
        places: of the grid's lines, in true units.
        values: row i is x[i].
        levels: of the lines, common to the panels that are to be compared.
        label: write the level on each line.
    """
    shown = np.ma.masked_invalid(values.T)
    ax.set_facecolor(BAD)
    look: dict[str, Any] = {"levels": levels}
    filled = ax.contourf(*places, shown, cmap="viridis", norm=_norm(levels), extend="both", alpha=0.9, **look)
    lines = ax.contour(*places, shown, colors="k", linewidths=0.4, **look)
    if label:
        for text in ax.clabel(lines, levels[1::2].tolist(), fontsize=6, fmt=lambda level: f"{level:.2g}"):
            text.set_path_effects(HALO)
    ax.grid(visible=False)
    return filled


def relief(ax: Any, places: tuple[FloatArray, FloatArray], values: FloatArray, *, levels: FloatArray) -> None:
    """Draw the same as a relief on 3-D axes; its height is the logarithm where the levels are logarithmic."""
    log = bool(levels[0] > 0)
    height = np.log10(np.maximum(values, levels[0])) if log else values
    ends = np.log10(levels[[0, -1]]) if log else levels[[0, -1]]
    x, y = np.meshgrid(*places, indexing="ij")
    ax.plot_surface(x, y, np.where(np.isfinite(height), height, np.nan), cmap="viridis", vmin=ends[0], vmax=ends[1])
    ax.set_zlim(*ends)
    ax.set_zlabel("loss (nats)", fontsize=7)
    if log:
        ax.zaxis.set_major_formatter(lambda z, _: f"{10**z:.2g}")


def marked(ax: Axes, marks: FloatArray, names: Sequence[str], *, connected: bool = False) -> None:
    """Draw points (K, 2) of the plane with their names; as a path with its ends named where they are connected."""
    if not len(marks):
        return
    ax.plot(*marks.T, "-o" if connected else "o", color="C3", ms=3, lw=1, mec="white", mew=0.5, zorder=5)
    shown = range(len(marks)) if not connected else (0, len(marks) - 1)
    for index in shown:
        ax.annotate(
            names[index], marks[index], (4, 4), textcoords="offset points", fontsize=7, path_effects=HALO, zorder=6
        )


def factors(ax: Axes, frame: pd.DataFrame) -> None:
    """Draw the factors by which measures of flatness moved, on a logarithmic axis, in the order of the rows.

    Args:
        ax: the axes.
        frame: as `ScaleAudit.to_frame` returns it.
    """
    places = np.arange(len(frame))[::-1]
    ax.axvline(1.0, color="0.6", lw=0.8)
    for way, shift, marker in (("layer", 0.12, "o"), ("channel", -0.12, "s")):
        value = frame[f"ratio, by {way}"].to_numpy(float)
        low, high = (frame[f"{end}, by {way}"].fillna(frame[f"ratio, by {way}"]).to_numpy(float) for end in ENDS)
        bars = np.maximum([value - low, high - value], 0.0)
        label = f"one factor for each {'pair of layers' if way == 'layer' else way}"
        ax.errorbar(value, places + shift, xerr=bars, fmt=marker, ms=4, label=label)
    ax.set_xscale("log")
    ax.set_yticks(places, frame["measure"].tolist())
    ax.set(xlabel="after / before (the function is the same)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _norm(levels: FloatArray) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    kind = LogNorm if levels[0] > 0 and levels[-1] / levels[0] > 10 else Normalize
    return kind(float(levels[0]), float(levels[-1]))
