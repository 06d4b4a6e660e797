"""`flatlab noise`: from measured runs to a table of quantization noise and a picture of its layers. Torch-free."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flatlab import files, plots
from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.report import tables, verdicts
from flatlab.results.quantization_noise import DRAWS, NetworkNoise
from flatlab.results.verdicts import holm
from flatlab.specs.measurements import QuantizationNoiseSpec
from flatlab.specs.run import RunSpec
from flatlab.store.runs import Run, RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[Any, Any]
TITLE = "Quantization noise: KL to the uniform (nats) beside that of a uniform sample, and p-values"
MODES = {  # what is pooled in one histogram
    "normalised": "noise of the run in steps of its channel",
    "raw": "noise of the run, all channels pooled",
    "tensor": "noise of one step size for the layer",
}
LABELS = {"normalised": "each channel in its steps", "raw": "channels pooled", "tensor": "one step for the layer"}
UNITS = {"normalised": "Noise $(w_q - w)/s$ (steps)", "raw": "Noise $w_q - w$", "tensor": "Noise $w_q - w$"}
SHOWN = {"method": "", "layer": "", "mode": "", "count": ",d", "bins": "d", "kl": ".4g", "kl_null": ".4g"}
SHOWN |= {"kl_corrected": ".4g", "kl_pvalue": ".3f", "ks_pvalue": ".3f", "clipped": ".2%", "bowley": "+.3f"}
SHOWN |= {"departure_pvalue": ".3f"}
NULL = "Right: quartile skewness, and the range of 95 % of symmetric samples of as many weights."
MOST = 6  # layers of a picture, unless a pattern names more
REJECTED = 0.05  # p-values below it
TESTS = {"kl_pvalue": "KL", "ks_pvalue": "Kolmogorov-Smirnov", "departure_pvalue": "symmetry"}
BY_DRAWS = ("kl_pvalue", "departure_pvalue")  # p-values are shares of DRAWS draws


def statistics(store: RunStore, wanted: Iterable[tuple[str, RunSpec, QuantizationNoiseSpec]]) -> pd.DataFrame:
    """Return one row per run, layer and mode: divergences with their nulls, tests, symmetry.

    Args:
        store: contains the finished measurements.
        wanted: method's name, run, measurement.

    Raises:
        UserError: if a run is not measured yet.
    """
    frames = []
    for label, spec, measurement in wanted:
        about = {"method": label, "held_out": spec.held_out, "seed": spec.seed, "run": spec.digest}
        frames.append(tables.of(about, store.run(spec).result(measurement, label).to_frame()))
    return pd.concat(frames, ignore_index=True)


def drawn(
    store: RunStore, rows: pd.DataFrame, wanted: Iterable[tuple[str, RunSpec, QuantizationNoiseSpec]]
) -> files.Arrays:
    """Return the histograms and quantiles that a picture of these rows shows, by run and name.

    Args:
        store: contains the finished measurements.
        rows: of `statistics`.
        wanted: method's name, run, measurement.
    """
    held: files.Arrays = {}
    for label, spec, measurement in wanted:
        mine = set(rows.loc[rows["run"] == spec.digest, ["mode", "index"]].itertuples(index=False, name=None))
        layers = store.run(spec).result(measurement, label).layers
        kept = [each for each in layers if (each.numbers["mode"], each.numbers["index"]) in mine]
        held |= {f"{spec.digest}-{name}": each for name, each in NetworkNoise(tuple(kept)).to_arrays()[0].items()}
    return held


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per layer and mode: the divergence less a uniform sample's over seeds, and the shares rejected.

    The layers of a mode are a family of tests.
    """
    by = ["method", "mode", "layer"]
    found = tables.against_zero(frame, by, value="kl_corrected").assign(baseline="a uniform sample")
    table = verdicts.corrected(found, "KL, " + found["mode"].map(MODES))
    refused = frame.assign(**{name: frame[name] < REJECTED for name in TESTS}).rename(columns=TESTS)
    names = ["count", "bins", "kl", "kl_null", "explained", "clipped", "zero_channels", "variance_ratio"]
    means = refused.groupby(by)[[*names, *TESTS.values()]].mean()
    return table.merge(means.reset_index(), on=by)


def refused(frame: pd.DataFrame) -> list[str]:
    """Return for each test how many layers and runs it rejects at 5 % after Holm's correction, and without it.

    A test by draws has a smallest p-value, which the correction may raise above 5 %: it can then reject nothing.
    """
    least = len(frame) / (DRAWS + 1)
    parts = []
    for name, what in TESTS.items():
        alone, kept = (int((p < REJECTED).sum()) for p in (frame[name], holm(frame[name])))
        if name in BY_DRAWS and least >= REJECTED:
            parts.append(f"{what} cannot be, since {DRAWS} draws give p >= {least:.2g} ({alone} without correction)")
        else:
            parts.append(f"{what} {kept} ({alone} without correction)")
    return parts


def chosen_layers(frame: pd.DataFrame, pattern: str | None = None, most: int = MOST) -> list[str]:
    """Return the layers that a picture shows: those that match, or some spread evenly over the network.

    Args:
        frame: as `statistics` returns it.
        pattern: such as "features.layer4.*".
        most: maximum number of layers without a pattern.

    Raises:
        UserError: if nothing matches.
    """
    there = list(dict.fromkeys(frame["layer"]))
    if pattern is None:
        return [there[i] for i in np.unique(np.linspace(0, len(there) - 1, min(most, len(there))).round().astype(int))]
    matching = [name for name in there if fnmatchcase(name, pattern)]
    if not matching:
        raise UserError(f"No quantized layer matches {pattern!r}; available: {', '.join(there)}.")
    return matching


def draw(rows: pd.DataFrame, caption: str, arrays: files.Arrays) -> "Figure":
    """Draw weights, noise and symmetry, one line of panels for each row of the frame.

    Args:
        rows: of `statistics`.
        caption: title, line feed, notes.
        arrays: as `drawn` returns them.
    """
    import matplotlib.pyplot as plt

    with plots.style(), plt.rc_context({"axes.titlesize": 7}):
        figure, grid = plt.subplots(
            len(rows), 3, figsize=(7.0, 1.0 + 1.75 * len(rows)), layout="constrained", squeeze=False
        )
        for axes, row in zip(grid, rows.to_dict("records"), strict=True):
            mine = {name.removeprefix(f"{row['run']}-"): array for name, array in arrays.items()}
            (layer,) = NetworkNoise.from_arrays(mine, [{"mode": row["mode"], "index": row["index"]}]).layers
            layer.weight.plot(axes[0], color="C7").locator_params(axis="x", nbins=3)
            axes[0].set(title=f"{row['layer']}\n{LABELS[row['mode']]}", xlabel="Weight $w$", ylabel="Density")
            layer.plot(axes[1]).locator_params(axis="x", nbins=3)
            _label(axes[1], row)
            _mirror(axes[2], layer.lower, layer.upper, row)
        plots.captioned(figure, grid[0, 1], caption, fontsize=7)
    return figure


def _label(ax: "Axes", row: Row) -> None:
    numbers = f"KL {row['kl']:.2g}, uniform sample {row['kl_null']:.2g}"
    ax.set(title=f"{numbers}\nN = {row['count']:,}, {row['bins']} bins", xlabel=UNITS[str(row["mode"])], ylabel="")
    ax.margins(y=0.1)


def _mirror(ax: "Axes", lower: FloatArray, upper: FloatArray, row: Row) -> None:
    far = max(lower.max(), upper.max())
    ax.plot(lower, upper, ".", color="C0", markersize=2)
    ax.plot([0, far], [0, far], "k--", linewidth=1)
    low, high = row["bowley_null_low"], row["bowley_null_high"]
    ax.set_title(
        f"Skewness {row['bowley']:+.3f}\nif symmetric: {low:+.3f} to {high:+.3f}, p = {row['departure_pvalue']:.2g}"
    )
    ax.set(xlabel="Median − lower half", ylabel="Upper half − median")
    ax.locator_params(nbins=4)


def chart(
    store: RunStore, found: list[Run], measurement: QuantizationNoiseSpec, *, layers: str | None, out: Path
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw measured runs; write `noise.{csv,pdf,png}`.

    Args:
        store: contains the measurements.
        found: the runs.
        measurement: as measured.
        layers: pattern of those that are drawn.
        out: folder of the pictures.
    """
    wanted = [(run.name, run.spec, measurement) for run in found]
    frame = statistics(store, wanted)
    names = chosen_layers(frame, layers)
    rows = frame[frame["layer"].isin(names) & (frame["mode"] == "normalised")]
    bits = "/".join(str(each) for each in dict.fromkeys(frame["bits"]))
    caption = (
        f"Quantization noise, {bits} bits: {', '.join(dict.fromkeys(frame['method']))}\n{MODES['normalised']}. {NULL}"
    )
    return frame, plots.save(draw(rows, caption, drawn(store, rows, wanted)), out / "noise", frame)
