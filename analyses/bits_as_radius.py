"""What a bit width is worth as a radius: rounding noise beside random directions of its length (no figure of QT-DoG).

The paper takes quantization noise for a random step that finds flat minima. Around the latent weights of each run the
loss is looked at where rounding puts them, at 8 to 2 bits, and along random twins of that noise under two nulls: as
long on the whole, and as long in each channel. The norm of the noise is its radius in Figure 3.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from flatlab.report import rounding, tables
from flatlab.report.panels import SOURCE, TITLES
from flatlab.specs.measurements import RoundingSpec
from flatlab.specs.methods import METHODS, replicates
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

BASELINE = "ERM"
ORDER = ("ERM", "QT-DoG")
IMAGES, DIRECTIONS = 64, 48  # of each domain; beside each perturbation: a typical spread is known to 10 %
LAYER_BITS = (4,)
MOST = 5  # layers that are told one by one
SUMMARY = "Rises (nats), source domains, means over held-out domains and seeds; z: standard deviations above random "
SUMMARY += "directions, 95 % intervals over seeds; * excludes 0"


def measurement(setting: Setting) -> RoundingSpec:
    """Return the measurement of each run."""
    directions = setting.num_samples or DIRECTIONS
    return RoundingSpec.make(
        images=setting.images or IMAGES,
        num_samples=directions,
        layer_bits=LAYER_BITS,
        granularity=setting.granularity,
    )


def labelled(setting: Setting) -> list[tuple[str, RunSpec]]:
    """Return each run with its method's name."""
    return [(name, spec) for name in ORDER for spec in replicates(METHODS[name], setting)]


def plan(setting: Setting) -> tuple[list[RunSpec], list[tuple[RunSpec, RoundingSpec]]]:
    """Return the runs and the measurements that the figure needs."""
    runs = [spec for _, spec in labelled(setting)]
    return runs, [(run, measurement(setting)) for run in runs]


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return the rises of each run with intervals over directions, and of each method over seeds."""
    return rounding.with_seeds(
        rounding.rises(store, [(name, run, measurement(setting)) for name, run in labelled(setting)])
    )


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over seeds, for `z` with a verdict: is the rise of the noise typical of random directions?"""
    whole = frame[frame["over"] == "seeds"].drop(columns=["held_out", "seed"])
    z = whole["quantity"] == "z"
    cases = [~z, whole["low"] > 0, whole["high"] < 0, whole["low"].notna()]
    return whole.assign(verdict=np.select(cases, ["", "above random", "below random", "typical"], default="one seed"))


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each method and bit width, the two nulls side by side."""
    mine = findings[(findings["panel"] == SOURCE) & (findings["part"] == "all")]
    rows = []
    for (method, bits), cells in mine.groupby(["method", "perturbation"], sort=False):
        row: dict[str, Any] = {"method": method, "bits": str(bits), "γ": f"{cells['gamma'].iloc[0]:.2f}"}
        row["γ / norm of the weights"] = f"{cells['share'].iloc[0]:.3f}"
        at = {(cell["null"], cell["quantity"]): cell for cell in cells.to_dict("records")}
        row["noise"] = f"{at['channel', 'rise']['value']:+.4f}"
        for null in rounding.LOOKS:
            row[null] = f"{at[null, 'random']['value']:.4f}"
            row[f"z {null}"] = tables.bracketed(*(at[null, "z"][name] for name in ("value", "low", "high")))
        rows.append(row)
    return pd.DataFrame(rows)


def remarks(frame: pd.DataFrame) -> list[str]:
    """Say under which null the noise is typical, at which bits, and whether training with it lowers its rise."""
    found = findings(frame)
    z = found[(found["quantity"] == "z") & (found["panel"] == SOURCE) & (found["part"] == "all")]
    said = []
    for (method, null), rows in z.groupby(["method", "null"], sort=False):
        verdicts = rows.groupby("verdict", sort=False)["perturbation"].agg(", ".join)
        told = "; ".join(f"{verdict} at {bits}" for verdict, bits in verdicts.items())
        said.append(f"{method!s}, {rounding.LOOKS[str(null)]}: the noise is {told} (bits; trained: its own quantizer).")
    said += _layer_by_layer(found)
    each = frame[(frame["over"] == "directions") & (frame["quantity"] == "rise") & (frame["null"] == "channel")]
    each = each[(each["part"] == "all") & (each["perturbation"] != "trained")]
    less = tables.paired(each, BASELINE, ["panel", "perturbation"])
    less["told"] = [tables.bracketed(*cells) for cells in less[["value", "low", "high"]].itertuples(index=False)]
    for panel, rows in less.groupby("panel", sort=False):
        told = ", ".join(f"{bits} bits {cell}" for bits, cell in zip(rows["perturbation"], rows["told"], strict=True))
        said.append(
            f"Rise of rounding around {ORDER[1]} less that around {BASELINE}, {TITLES[str(panel)]}: {told} nats."
        )
    return said


def _layer_by_layer(found: pd.DataFrame) -> list[str]:
    """Say how far the loss rises where one layer alone is rounded, for those where it rises most."""
    said = []
    alone = found[(found["part"] != "all") & (found["panel"] == SOURCE) & (found["null"] == "channel")]
    for (method, bits), rows in alone.groupby(["method", "perturbation"], sort=False):
        cells = rows.pivot(index=["part", "gamma"], columns="quantity", values="value").reset_index()
        most = cells.sort_values("rise", ascending=False).head(MOST).to_dict("records")
        told = [
            f"{c['part']} γ {c['gamma']:.2f}, {c['rise']:+.4f} (random {c['random']:.4f}, z {c['z']:+.1f})"
            for c in most
        ]
        said.append(f"{method!s}, one layer alone, {bits} (bits; trained: its own quantizer): {'; '.join(told)} nats.")
    return said


def caption(setting: Setting) -> str:
    """Say in a title and a line below which data, seeds and directions the picture shows."""
    chosen = measurement(setting)
    return (
        f"What a bit width is worth as a radius: {setting.words}\n"
        f"Source domains, {chosen.images} images of each; {chosen.num_samples} random directions beside each width. "
        f"Means over held-out domains; bars and bands: {setting.interval}. Grey: 95 % of random directions. "
        "own: the run's own quantizer."
    )


def draw(frame: pd.DataFrame, caption: str) -> Figure:
    """Draw for each method the rises over the radius, and how typical the noise is."""
    return rounding.draw(frame[frame["over"] == "seeds"], caption)
