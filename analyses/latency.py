"""Accuracy on the held-out domain against latency and bytes: floats, integer weights, int8, ensembles (cf. Fig. 1).

Each network is timed beside itself in full precision, in turn on one processor, for one image and one thread: a ratio
below 1 is faster. Runs are of the first held-out domain. Measure with `--workers 1` on a machine that is idle.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.analysis import Analysis, Measured, from_table
from flatlab.report import tables, verdicts
from flatlab.resources import published
from flatlab.results.size import Latency
from flatlab.specs.measurements import LatencySpec, SizeSpec
from flatlab.specs.methods import METHODS, Labelled, replicates
from flatlab.specs.settings import SMOKE, Setting
from flatlab.store.runs import Run, RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "float32"
BITS = (8, 7, 5, 4)
INT8 = 7  # bits of the weights that int8 activations are added to: QT-DoG's
SIZE = SizeSpec()
MEASURES = {"accuracy": "Accuracy (points)", "time": "Time over float32", "bytes": "Bytes over float32"}
SUMMARY = (
    "Differences to float32, paired by seed, 95 % intervals over seeds, each alone; "
    "* p < 0.05 after Holm over the lines of a column"
)


def labelled(setting: Setting) -> list[Labelled]:
    """Return each run of the first held-out domain, by its method and bits."""
    one = setting.replace(held_out=setting.held_out[:1], others=())
    lines = [(f"{bits} bit", METHODS["QT-DoG"], one.replace(bits=bits)) for bits in BITS]
    lines = [("ERM", METHODS["ERM"], one), *lines, ("EoQ", METHODS["EoQ"], one)]
    return [(label, run) for label, parts, each in lines for run in replicates(parts, each)]


def timing(setting: Setting) -> LatencySpec:
    """Return the measurement of a run's times; a call of a small network takes microseconds."""
    return LatencySpec(rounds=6 if setting.name == SMOKE.name else 300 if setting.model.startswith("digits") else 30)


def measured(setting: Setting) -> Measured:
    """Return the times and the packed size of each run."""
    return [(run, spec) for _, run in labelled(setting) for spec in (timing(setting), SIZE)]


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return accuracy, time and bytes of each run in each engine, and of each line over seeds."""
    rows = [
        {"method": method, "held_out": run.held_out, "seed": run.seed, "measure": measure, **values}
        for label, run in labelled(setting)
        for method, measures in _engines(label, store.run(run), timing(setting)).items()
        for measure, values in measures.items()
    ]
    each = pd.DataFrame(rows)
    return pd.concat([each.assign(over="run"), tables.over_seeds(each, ["measure", "method"])], ignore_index=True)


def _engines(label: str, run: Run, spec: LatencySpec) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the numbers of a run by the names of lines: floats, integer weights, int8; times with their intervals."""
    found: Latency = run.result(spec)
    first = (0, 0)  # one thread, one image
    base = found.fastest(found.networks[-1], first)  # of an ensemble one member, which comes last
    assert base is not None
    own = {engine: place for place, engine in reversed(list(enumerate(found.engines)))}
    packed = run.result(SIZE).bytes / found.bytes[base]

    def of(place: int, size: float) -> dict[str, dict[str, Any]]:
        value, low, high = found.ratio(place, base, first)
        time = {"value": value, "low": low, "high": high, "members": found.members[place]}
        accuracy = {"value": 100 * float(found.accuracies[place])}
        where = {"processor": found.processor, "load": found.load}
        return {"accuracy": accuracy, "time": time | where, "bytes": {"value": size}}

    if label == "ERM":
        return {BASELINE: of(base, 1.0)}
    names = {label: of(own["weight-only"], packed)}
    if label in (f"{INT8} bit", "EoQ"):
        size = found.bytes[own["int8"]] / found.bytes[base]
        names["int8" if label != "EoQ" else "EoQ, int8"] = of(own["int8"], size)
    return names


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return each line less float32; a family of tests for each measure that varies over seeds."""
    each = frame[(frame["over"] == "run") & (frame["measure"] != "bytes")]
    found = tables.paired(each, BASELINE, ["measure"])
    return verdicts.corrected(found, found["measure"].map(MEASURES))


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each pair and a column for each measure."""
    return verdicts.by_measure(findings, MEASURES, ["pair"])


def sheet(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each method: accuracy in percent, time and bytes over those of float32, means over seeds."""
    whole = frame[frame["over"] == "seeds"]
    wide = whole.pivot_table(index="method", columns="measure", values="value", sort=False)
    names = {"accuracy": "accuracy (%)", "time": "time over float32", "bytes": "bytes over float32"}
    return wide[list(names)].rename(columns=names).round(3).reset_index()


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the tests."""
    found = findings(frame)
    accuracy, time = (found[found["measure"] == measure] for measure in ("accuracy", "time"))
    lines = verdicts.sentences(accuracy, words=("less accurate", "more accurate"), unit="points", digits=2)
    lines += verdicts.sentences(time, words=("faster", "slower"), unit="of its time", digits=2)
    return [*lines, verdicts.statement(found), *_ensembles(frame), *_provenance(frame)]


def _ensembles(frame: pd.DataFrame) -> list[str]:
    """Return a sentence for each ensemble: what it costs beside one network."""
    each = frame[frame["over"] == "run"]
    sizes = each[each["measure"] == "bytes"].set_index("method")["value"]
    return [
        f"{row['method']}: its {row['members']:.0f} networks take {row['value']:.2f} [{row['low']:.2f}, "
        f"{row['high']:.2f}] times as long as one in float32 (95 % over rounds), and {sizes[row['method']]:.2f} times "
        "the bytes; the paper states no computational or memory overheads."
        for row in each[(each["measure"] == "time") & (each["members"] > 1)].to_dict("records")
    ]


def _provenance(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the processor, its load, and the paper's ratio."""
    paper = published()["misc"]["latency_ms_resnet50_amd_epyc_7302"]
    load = frame.get("load", pd.Series(dtype=float)).dropna().astype(float)
    return [
        f"Processor: {', '.join(sorted(frame['processor'].dropna().unique()))}.",
        f"Load average over the minute before timing: {load.min():.1f} to {load.max():.1f}."
        if len(load)
        else "The load of the machine was not recorded.",
        f"As published, not measured here: ResNet-50 in int8 is {paper['float32'] / paper['int8']:.2f} times as fast "
        f"as in full precision on an AMD EPYC 7302 ({paper['source']}).",
    ]


def caption(setting: Setting) -> str:
    """Return title and notes: data, intervals, what time and bytes are."""
    return (
        f"Accuracy, time, bytes: {setting.replace(held_out=setting.held_out[:1], others=()).words}\n"
        f"Held out: {setting.held_out[0]}. Time: one image, one thread, over the same network in float32 (the faster "
        "of torch and onnxruntime; of an ensemble one member), median of interleaved rounds. Bytes: the packed file; "
        f"of int8 the ONNX file, with weights of {INT8} bits; over one network in float32. ONNX files hold 8 bits a "
        f"weight, whatever its bits. Bars: {setting.interval}; ensembles have none."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw accuracy over time and over bytes, a marker for each line."""
    import matplotlib.pyplot as plt

    whole = frame[frame["over"] == "seeds"].set_index(["measure", "method"])
    accuracy = whole.loc["accuracy"]
    with plots.style():
        figure, axes = plt.subplots(1, 2, figsize=(plots.COLUMN, 3.4), layout="constrained", sharey=True)
        for ax, measure in zip(axes, ("time", "bytes"), strict=True):
            for index, (name, row) in enumerate(accuracy.iterrows()):
                _point(ax, whole.loc[measure].loc[str(name)], row, {"color": f"C{index}", "label": str(name)})
            ax.axvline(1, color="0.3", linewidth=0.8)
            ax.set_xscale("log")
            ticks = np.array([0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
            low, high = ax.get_xlim()
            ax.set_xticks(ticks[(ticks >= low) & (ticks <= high)], minor=False)
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.set_xlabel(MEASURES[measure])
        axes[0].set_ylabel("Accuracy, held-out domain (%)")
        plots.captioned(figure, axes[0], caption, columns=4)
    return figure


def _point(ax: Any, x: Any, y: Any, look: dict[str, Any]) -> None:
    """Draw a marker with the intervals of both numbers, where they have any."""
    for ends, across in ((x, True), (y, False)):
        if np.isfinite([ends["low"], ends["high"]]).all():
            lines, at = (ax.hlines, y["value"]) if across else (ax.vlines, x["value"])
            lines(at, ends["low"], ends["high"], color=look["color"], linewidth=0.8)
    ax.plot(x["value"], y["value"], "o", markersize=4, **look)


FIGURE = Analysis(
    __name__,
    __doc__,
    baseline="ERM",
    labelled=labelled,
    measured=measured,
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    sheet=sheet,
    sheet_title="Means over seeds",
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
    alone=True,
)
