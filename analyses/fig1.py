"""Figure 1: accuracy on the held-out domain, the memory of the weights as the area of a marker (QT-DoG, Figure 1).

Memory is that of the exported file, relative to one network in float32; the nominal one, members times bits over 32 as
in the paper, is given in brackets. The paper's own picture is drawn in a separate panel.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from analyses._accuracy_table import AVERAGE
from analyses.table1 import TABLE
from flatlab import plots
from flatlab.analysis import from_table
from flatlab.resources import published
from flatlab.specs.measurements import SizeSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AREA = 60  # square points for the memory of one network
THEIRS = ("ERM", "MIRO", "SWAD", "DART", "QT-DoG", "DiWA", "EoA", "EoQ")  # in the paper's picture
SIZE = SizeSpec()


def _sized(setting: Setting) -> dict[str, RunSpec]:
    """Return one run of each line, since the others' files have the same size."""
    return dict(reversed(TABLE.labelled(setting.replace(others=()))))


def nominal(run: RunSpec) -> float:
    """Return the nominal memory of a run's weights, relative to one network of 32 bits."""
    bits = run.quantizer.bits if run.quantizer else 32
    return max(len(run.members), 1) * bits / 32


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return Table 1 with the memory of each line: that of its file, and the nominal one."""
    runs = _sized(setting)
    sizes = {label: store.run(run).result(SIZE, label) for label, run in runs.items()}
    one = sizes[TABLE.baseline].float_bytes
    frame = TABLE.table(store, setting)
    return frame.assign(
        memory=frame["method"].map({label: size.bytes / one for label, size in sizes.items()}),
        nominal=frame["method"].map({label: nominal(run) for label, run in runs.items()}),
    )


def caption(setting: Setting) -> str:
    """Return title and notes: data, intervals, memory."""
    area = f"Bars: {setting.interval}; ensembles have none. Area, and number: the exported file over one network "
    area += "in float32; in brackets the nominal memory, bits times members over 32, which is the area below."
    return f"Accuracy and memory: {setting.words}\n{TABLE.protocol(setting)} {area}"


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw ours above the paper's: methods side by side, marker area by memory."""
    import matplotlib.pyplot as plt

    whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")]
    if (means := whole["dataset"].str.startswith(AVERAGE)).any():
        whole = whole[means]
    ours = whole.set_index("method")[["value", "low", "high", "memory", "nominal"]]
    with plots.style():
        figure, (above, below) = plt.subplots(2, 1, figsize=(plots.COLUMN, 4.6), layout="constrained")
        above.vlines(range(len(ours)), ours["low"], ours["high"], color="0.4", linewidth=0.8, zorder=3)
        _bubbles(above, ours)
        _bubbles(below, _theirs())
        for place, row in enumerate(ours.itertuples()):
            label = f"{row.memory:.2g}\n({row.nominal:.2g})"
            look: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 5.5}
            above.annotate(label, (place, 0.02), **look)
        above.margins(y=0.45)  # room for the numbers
        above.set_title(f"Ours: {', '.join(whole['dataset'].unique())}", loc="left")
        below.set_title("As published: mean of five data sets, ResNet-50", loc="left")
        plots.captioned(figure, below, caption)
    return figure


def _theirs() -> pd.DataFrame:
    rows = {row["algorithm"]: row for row in published()["tables"]["1"]["rows"]}
    sizes = [float(rows[name]["relative_size"].split("-")[0].rstrip("x")) for name in THEIRS]
    return pd.DataFrame({"value": [rows[name]["Avg"]["mean"] for name in THEIRS], "memory": sizes}, index=list(THEIRS))


def _bubbles(ax: "Axes", frame: pd.DataFrame) -> None:
    for label, more, color, marker in (("one network", False, "C0", "o"), ("several", True, "C2", "s")):
        several = frame.index.isin(["ERM Ens.", "EoA", "EoQ", "DiWA", "DART"])
        places = [place for place, each in enumerate(several) if each == more]
        mine = frame.iloc[places]
        ax.scatter(places, mine["value"], AREA * mine["memory"], color=color, marker=marker, alpha=0.5, label=label)
        ax.scatter(places, mine["value"], 4, color="black", zorder=4)
    ax.set_xticks(range(len(frame)), list(frame.index), rotation=40, ha="right")
    ax.set_ylabel("Accuracy (%)")
    ax.margins(0.12)


FIGURE = replace(
    TABLE.figure(__name__, __doc__),
    measured=lambda setting: [(run, SIZE) for run in _sized(setting).values()],
    table=table,
    caption=caption,
    draw=from_table(draw),
)
