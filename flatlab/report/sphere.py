"""`flatlab flatness`: from words to a measurement, and from measured runs to a table and a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd

from flatlab import files, plots
from flatlab.report import tables
from flatlab.results import verdicts
from flatlab.results.estimate import Estimate, FloatArray, estimate
from flatlab.specs.measurements import SphereSpec
from flatlab.store.runs import Run, RunStore

PANELS = {"source": "train", "target": "test"}
WHICH = {panel: f"{split}" for split, panel in PANELS.items()}
SHOWN = {"method": "", "held_out": "", "seed": "", "radius": ".4g", "value": ".4g", "low": ".4g", "high": ".4g"}
SHOWN |= {"l2": ".4g", "share": ".3f", "rms": ".2e"}  # what a screen has room for


def chart(
    store: RunStore, found: list[Run], measurement: SphereSpec, *, panel: str, out: Path
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw measured runs; write `flatness.{csv,pdf,png}`.

    Args:
        store: holds the measurements.
        found: the runs.
        measurement: as measured.
        panel: "train" (the seen domains) or "test" (the unseen one).
        out: folder of the pictures.
    """
    wanted = [(run.name, run.spec, measurement) for run in found]
    frame = tables.flatness(store, wanted)
    shown = frame[frame["panel"] == panel].drop(columns="panel")
    shown = shown.assign(**_lengths(found, measurement, shown))
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / "flatness.csv", shown.to_csv(index=False).encode())
    return shown, [*plots.save(_draw(shown, measurement, panel), out / "flatness"), out / "flatness.csv"]


def said(found: list[Run], measurement: SphereSpec, *, panel: str) -> list[str]:
    """Say what the numbers say: where F means little, and which checkpoint is flatter than the first.

    Args:
        found: the runs, measured.
        measurement: as measured.
        panel: "train" (the seen domains) or "test" (the unseen one).
    """
    seen = {run.name: _seen(run, measurement, panel) for run in found}
    told = [
        f"{name}: {sentence}"
        for name, each in seen.items()
        for sentence in verdicts.remarks(each.radii, each.rises, each.slopes)
    ]
    for name, each in seen.items():
        if each.guessing.any():
            where = (
                f"the loss reaches that of guessing ({each.chance:.2f} nats) at radius {each.radii[each.guessing][0]:g}"
            )
            told.append(f"{name}: {where}: no verdict from there on.")
    first, *others = seen
    for other in others:
        read = ~(np.logical_or.accumulate(seen[first].guessing | seen[other].guessing))
        if np.array_equal(seen[first].radii, seen[other].radii) and (seen[first].radii[read] > 0).any():
            differences = [each for each, kept in zip(_difference(seen[first], seen[other]), read, strict=True) if kept]
            told.append(f"{verdicts.verdict(differences, seen[first].radii[read], (first, other))}.")
    return told


@dataclass(frozen=True)
class Seen:
    """What one run showed on the domains of a panel: rises (J,) at each radius, by which plan, and slopes (K,)."""

    radii: FloatArray
    rises: list[FloatArray]
    blocks: list[int]
    plans: list[tuple[int, bool]]  # block size, pairs
    slopes: FloatArray | None
    base_loss: float
    chance: float  # the loss of guessing, ln C

    @property
    def guessing(self) -> npt.NDArray[np.bool_]:
        """At which radii (R,) the loss is that of guessing, or not finite."""
        means = np.array([rises.mean() for rises in self.rises])
        return np.asarray(~(self.base_loss + means < self.chance))


def _seen(run: Run, measurement: SphereSpec, panel: str) -> Seen:
    arrays, facts = run.measured(measurement)
    mine = np.array([(name == run.spec.held_out) == (panel == "test") for name in facts["strata"]])
    rises = [arrays[f"visits-{index:02d}"][:, mine].mean(axis=1) for index in range(len(arrays["radii"]))]
    slopes = arrays["slopes"][:, mine][:, :, mine].mean(axis=(1, 2)) if "slopes" in arrays else None
    plans = [(plan["block_size"], plan["paired"]) for plan in facts["plans"]]
    base_loss = float(arrays["base_loss"][mine].mean())
    return Seen(arrays["radii"], rises, facts["blocks"], plans, slopes, base_loss, facts["chance"])


def _difference(a: Seen, b: Seen) -> list[Estimate]:
    """Return estimates of a less b: along the rays that both walked by one plan, else of each alone."""
    found = []
    for index in range(len(a.radii)):
        one, two, blocks = a.rises[index], b.rises[index], a.blocks[index]
        if a.plans[index] == b.plans[index] and blocks == b.blocks[index]:
            common = min(len(one), len(two))
            found.append(estimate(one[:common] - two[:common], blocks))
        else:
            each = [estimate(one, blocks), estimate(two, b.blocks[index])]
            spread, freedom = np.hypot(each[0].stderr, each[1].stderr), min(e.freedom for e in each)
            found.append(Estimate(each[0].value - each[1].value, float(spread), freedom))
    return found


def _lengths(found: list[Run], measurement: SphereSpec, shown: pd.DataFrame) -> dict[str, list[float]]:
    """Return each radius as L2 distance, as a share of ||w||, and per parameter."""
    lengths: dict[str, list[float]] = {"l2": [], "share": [], "rms": []}
    for run in found:
        arrays, facts = run.measured(measurement)
        for radius in arrays["radii"]:
            distance = radius * facts["reach"]
            lengths["l2"].append(distance)
            lengths["share"].append(distance / facts["norm"])
            lengths["rms"].append(distance / facts["num_params"] ** 0.5)
    assert len(lengths["l2"]) == len(shown)
    return lengths


def _draw(shown: pd.DataFrame, measurement: SphereSpec, panel: str) -> Any:
    with plots.style():
        figure, ax = plt.subplots(figsize=(3.4, 2.8), layout="constrained")
        plots.curves(ax, shown, x="radius", by="method", order=list(dict.fromkeys(shown["method"])))
        distance = "Radius γ (L2 distance)" if measurement.normalisation == "none" else "Relative radius ρ"
        ax.set(
            xlabel=distance,
            ylabel="Flatness $F(w)$ (nats)",
            title=f"{WHICH[panel]} domains, {measurement.effort}",
        )
        ax.legend()
    return figure
