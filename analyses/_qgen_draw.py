"""The picture of `qgen`: taus with intervals, F over the distance in units of noise, accuracy on corrupted images."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analyses import _kendall
from analyses._qgen_grid import FULL, MULTIPLES, name_of
from analyses._qgen_tests import GAPS, MEASURES, correlations, corrupted
from flatlab import plots
from flatlab.report import tables, verdicts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("gap in", "gap out")


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the taus of all pairs and of pairs of equal bits, F in units of noise, and the corruptions."""
    import matplotlib.pyplot as plt

    found = correlations(frame)
    with plots.style():
        figure, grid = plt.subplots(2, 2, figsize=(9.6, 7.6), layout="constrained")
        for ax, among in zip(grid[0], (_kendall.ALL, _kendall.EQUAL), strict=True):
            _taus(ax, found[(found["among"] == among) & ~found["reached"]], among)
        grid[0, 1].set_yticklabels([])
        grid[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, fontsize=6, ncols=2)
        _noise(grid[1, 0], frame)
        _corrupted(grid[1, 1], frame)
        plots.captioned(figure, grid[1, 1], caption)
    return figure


def _taus(ax: "Axes", found: pd.DataFrame, among: str) -> None:
    """Draw tau of each measure with the two gaps of the loss."""
    heights = np.arange(len(MEASURES))
    for index, gap in enumerate(SHOWN):
        rows = found[found["gap"] == gap].set_index("measure").reindex(list(MEASURES))
        look = {"color": f"C{index}", "label": f"gap {GAPS[gap]}"}
        plots.intervals(ax, rows, heights + 0.3 * (index - 0.5), rows["p_bh"] < verdicts.LEVEL, **look)
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set(yticks=heights, yticklabels=list(MEASURES.values()), ylim=(len(heights) - 0.5, -0.5))
    ax.set(xlabel=f"Kendall's tau, {among}")
    ax.grid(visible=False, axis="y")


def _noise(ax: "Axes", frame: pd.DataFrame) -> None:
    """Draw F over the distance in units of noise: of quantized networks, and dashed of full precision."""
    for index, bits in enumerate(_widths(frame)):
        names = [f"noise {bits} x {k:g}" for k in MULTIPLES]
        for own, style in ((bits, "-"), (FULL, "--")):
            mine = frame.loc[frame["bits"] == own, names]
            _band(ax, MULTIPLES, mine, style=f"{plots.MARKERS[index]}{style}", color=f"C{index}")
    ax.set(xscale="log", yscale="log", xlabel="Distance, in units of quantization noise", ylabel="F (nats)")
    ax.set_xticks(MULTIPLES, [f"{k:g}" for k in MULTIPLES], minor=False)
    ax.minorticks_off()


def _corrupted(ax: "Axes", frame: pd.DataFrame) -> None:
    """Draw the mean accuracy over the corruptions by severity."""
    each = corrupted(frame)
    for index, bits in enumerate([*_widths(frame), FULL]):
        wide = each[each["method"] == name_of(bits)].pivot(index="seed", columns="at", values="value")
        label = name_of(bits) if bits != FULL else "full precision"
        look = f"{plots.MARKERS[index]}-" if bits != FULL else "--"
        _band(
            ax, wide.columns.astype(float), wide, style=look, color=f"C{index}" if bits != FULL else "0.3", label=label
        )
    ax.set_xticks(sorted(set(each["at"])))
    ax.set(xlabel="Severity of the corruption", ylabel="Accuracy, source domains (points)")


def _widths(frame: pd.DataFrame) -> list[int]:
    return sorted(set(frame["bits"]) - {FULL})


def _band(ax: "Axes", x: Iterable[float], draws: pd.DataFrame, *, style: str, color: str, label: str = "") -> None:
    """Draw the means of columns of draws over x, with a band of their 95 % intervals."""
    places = list(x)
    rows = pd.DataFrame([tables.estimate(draws[name].to_numpy()) for name in draws])
    ax.plot(places, rows["value"], style, color=color, label=label or None, markersize=3.5)
    ax.fill_between(places, rows["low"], rows["high"], color=color, alpha=0.15, linewidth=0)
