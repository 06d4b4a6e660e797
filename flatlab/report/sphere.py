"""`flatlab flatness`: table, sentences and picture of measured runs."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.report import panels, tables
from flatlab.results.sphere import PairedDifference
from flatlab.specs.measurements import SphereSpec
from flatlab.store.runs import Run, RunStore

SHOWN = {"method": "", "held_out": "", "seed": "", "radius": ".4g", "value": ".4g", "low": ".4g", "high": ".4g"}
SHOWN |= {"l2": ".4g", "share": ".3f", "rms": ".2e"}


def chart(
    store: RunStore, found: list[Run], measurement: SphereSpec, *, panel: str, out: Path
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw measured runs; write `flatness.{csv,pdf,png}`.

    Args:
        store: contains the measurements.
        found: the runs.
        measurement: as measured.
        panel: "source" or "target" (the held-out domain).
        out: folder of the pictures.
    """
    wanted = [(run.name, run.spec, measurement) for run in found]
    frame = tables.flatness(store, wanted)
    shown = frame[frame["panel"] == panel].drop(columns="panel")
    if measurement.corruption:
        shown = shown.assign(corruption=measurement.corruption)
    each = [run.result(measurement) for run in found]
    lengths = {"l2": "distances", "share": "relative_radii", "rms": "rms"}
    shown = shown.assign(**{to: np.concatenate([getattr(one, name) for one in each]) for to, name in lengths.items()})
    return shown, plots.save(_draw(shown, measurement, panel), out / "flatness", shown)


def remarks(found: list[Run], measurement: SphereSpec, *, panel: str) -> list[str]:
    """Return sentences: at which radii F is not meaningful, and which checkpoint is flatter than the first.

    Args:
        found: the runs, measured.
        measurement: as measured.
        panel: "source" or "target" (the held-out domain).
    """
    seen = {run.name: panels.part_of(run.result(measurement), panel, run.spec.held_out) for run in found}
    sentences = [f"{name}: {sentence}" for name, each in seen.items() for sentence in each.remarks]
    first, *others = seen.items()
    shown = [panels.images_of(run.spec, panel) for run in found]
    for (name, other), images in zip(others, shown[1:], strict=True):
        if images != shown[0]:
            sentences.append(f"{name} has other images than {first[0]}: no verdict on which is flatter.")
        elif np.array_equal(first[1].radii, other.radii):
            pair = PairedDifference(cost=first[1].cost + other.cost, radii=other.radii, a=first[1], b=other)
            if (pair.radii[pair.read] > 0).any():
                sentences.append(f"{pair.verdict(first[0], name)}.")
    return sentences


def _draw(shown: pd.DataFrame, measurement: SphereSpec, panel: str) -> Any:
    with plots.style():
        figure, ax = plt.subplots(figsize=(3.4, 2.8), layout="constrained")
        plots.curves(ax, shown, x="radius", by="method", order=list(dict.fromkeys(shown["method"])))
        distance = "Radius γ (L2 distance)" if measurement.normalisation == "none" else "Relative radius ρ"
        ax.set(
            xlabel=distance,
            ylabel="Flatness $F(w)$ (nats)",
            title=f"{panels.TITLES[panel].capitalize()}{measurement.under}, {measurement.effort}",
        )
        ax.legend()
    return figure
