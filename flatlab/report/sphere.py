"""`flatlab flatness`: from words to a measurement, and from measured runs to a table and a picture."""

from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from flatlab import files, plots
from flatlab.errors import UserError, choose
from flatlab.report import panels, tables
from flatlab.results.sphere import PairedDifference
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.rises import ByRise
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import QUICK, papers_radii
from flatlab.store.runs import Run, RunStore

SHOWN = {"method": "", "held_out": "", "seed": "", "radius": ".4g", "value": ".4g", "low": ".4g", "high": ".4g"}
SHOWN |= {"l2": ".4g", "share": ".3f", "rms": ".2e"}  # what a screen has room for
NORMALISATIONS = ("none", "filter", "layer", "parameter")
LARGEST = 1e9
MOST = 10_000  # radii: more are a slip of the keyboard


def parse_radii(text: str) -> tuple[float, ...] | Literal["auto"]:
    """Read `start:stop:step`, the end included, or a comma-separated list; sorted, each once.

    Args:
        text: "0:60:5" or "0,0.5,1".

    Raises:
        UserError: where it is neither, or a radius is negative or not finite.
    """
    if text.strip().lower() == "auto":
        return "auto"
    radii = _numbers(text)
    if not any(radii) or not all(0 <= radius <= LARGEST for radius in radii):
        raise UserError(
            f"--radii must be auto, start:stop:step such as 0:60:5, or numbers such as 0,0.5,1, all from 0 to "
            f"{LARGEST:g}, got {text}."
        )
    return tuple(sorted(set(radii)))


def _numbers(text: str) -> list[float]:
    """Return the numbers, or none where the text is not understood."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        start, stop, step = (float(part) for part in text.split(":"))
        count = int(np.floor((stop - start) / step + 1e-9)) + 1 if step > 0 else 0
    except (ValueError, OverflowError):
        return []
    if count > MOST:
        raise UserError(f"--radii {text} names {count:,} radii; at most {MOST:,} are taken.")
    return [float(np.round(start + i * step, 12)) for i in range(count)]


def panel_of(split: str) -> str:
    """Return the panel that `--split` names."""
    return choose("split", split, panels.TITLES)


def measurement_of(radii: str | None, first: RunSpec, **fields: Any) -> SphereSpec:
    """Return the measurement that the command's words mean.

    Radii that are not given are those where the first run's loss rises by so many nats on its source domains, for all
    runs alike; of the paper's own network they are the paper's.
    """
    fields["normalisation"] = choose("normalisation", fields["normalisation"], NORMALISATIONS)
    fields["space"] = choose("space", fields["space"], ("baked", "latent"))
    fields["checkpoint"] = choose("checkpoint", fields["checkpoint"], ("selected", "last"))
    usual = papers_radii(first) if fields["normalisation"] == "none" else None
    risen = ByRise(rises=(*QUICK.rises, QUICK.beyond), references=(first.digest,))
    return SphereSpec.make(radii=parse_radii(radii) if radii is not None else usual or risen, **fields)


def chart(
    store: RunStore, found: list[Run], measurement: SphereSpec, *, panel: str, out: Path
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw measured runs; write `flatness.{csv,pdf,png}`.

    Args:
        store: holds the measurements.
        found: the runs.
        measurement: as measured.
        panel: "source" or "target" (the held-out domain).
        out: folder of the pictures.
    """
    wanted = [(run.name, run.spec, measurement) for run in found]
    frame = tables.flatness(store, wanted)
    shown = frame[frame["panel"] == panel].drop(columns="panel")
    each = [run.result(measurement) for run in found]
    lengths = {"l2": "distances", "share": "relative_radii", "rms": "rms"}
    shown = shown.assign(**{to: np.concatenate([getattr(one, name) for one in each]) for to, name in lengths.items()})
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / "flatness.csv", shown.to_csv(index=False).encode())
    return shown, [*plots.save(_draw(shown, measurement, panel), out / "flatness"), out / "flatness.csv"]


def said(found: list[Run], measurement: SphereSpec, *, panel: str) -> list[str]:
    """Say what the numbers say: where F means little, and which checkpoint is flatter than the first.

    Args:
        found: the runs, measured.
        measurement: as measured.
        panel: "source" or "target" (the held-out domain).
    """
    seen = {run.name: tables.panel_strata(run.result(measurement), run.spec, panel) for run in found}
    told = [f"{name}: {sentence}" for name, each in seen.items() for sentence in each.remarks]
    first, *others = seen.items()
    for name, other in others:
        if np.array_equal(first[1].radii, other.radii):
            pair = PairedDifference(cost=first[1].cost + other.cost, radii=other.radii, a=first[1], b=other)
            if (pair.radii[pair.read] > 0).any():
                told.append(f"{pair.verdict(first[0], name)}.")
    return told


def _draw(shown: pd.DataFrame, measurement: SphereSpec, panel: str) -> Any:
    with plots.style():
        figure, ax = plt.subplots(figsize=(3.4, 2.8), layout="constrained")
        plots.curves(ax, shown, x="radius", by="method", order=list(dict.fromkeys(shown["method"])))
        distance = "Radius γ (L2 distance)" if measurement.normalisation == "none" else "Relative radius ρ"
        ax.set(
            xlabel=distance,
            ylabel="Flatness $F(w)$ (nats)",
            title=f"{panels.TITLES[panel].capitalize()}, {measurement.effort}",
        )
        ax.legend()
    return figure
