"""Figure 5: what each bit width gains over ERM on the held-out domain (QT-DoG, Figure 5; its numbers are Table 9's)."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from analyses.table9 import BITS, TABLE
from flatlab import plots
from flatlab.analysis import from_table
from flatlab.specs.settings import Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the tests of the bit widths on the held-out domain."""
    return TABLE.remarks(frame[frame["panel"] == "target"])


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, interval."""
    band = f"Band: {setting.interval}; differences are paired by held-out domain and seed."
    return f"Gain on the held-out domain by bit width: {setting.words}\n{TABLE.protocol(setting)} {band}"


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the difference to ERM against the bits: a line for each data set, with bands over seeds."""
    import matplotlib.pyplot as plt

    less = TABLE.findings(frame[frame["panel"] == "target"])
    less = less[less["baseline"] == TABLE.baseline]
    less = less.assign(bits=less["method"].str.split().str[0].astype(int))
    theirs = less[less["published"].notna()].assign(value=less["published"], low=float("nan"), high=float("nan"))
    shown = pd.concat([less, theirs.assign(dataset=theirs["dataset"] + ", published")])
    with plots.style():
        figure, ax = plt.subplots(figsize=(plots.COLUMN, 2.4), layout="constrained")
        plots.curves(ax, shown, x="bits", by="dataset", order=list(shown["dataset"].drop_duplicates()))
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set(xticks=BITS, xlabel="Bits of a weight", ylabel=f"Accuracy less {TABLE.baseline} (points)")
        ax.invert_xaxis()
        plots.captioned(figure, ax, caption)
    return figure


FIGURE = replace(TABLE.figure(__name__, __doc__), remarks=remarks, caption=caption, draw=from_table(draw))
