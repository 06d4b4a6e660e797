"""`flatlab flatness`: from words to a probe, and from measured runs to a table and a picture."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from flatlab import files, plots, tables
from flatlab.errors import UserError, choose
from flatlab.runs import Run, RunStore
from flatlab.specs import ProbeSpec

PANELS = {"source": "train", "target": "test"}


def parse_radii(text: str) -> tuple[float, ...]:
    """Read `start:stop:step`, the end included, or a comma-separated list.

    Args:
        text: "0:60:5" or "0,0.5,1".

    Raises:
        UserError: where it is neither.
    """
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        start, stop, step = (float(part) for part in text.split(":"))
        count = int(np.floor((stop - start) / step + 1e-9)) + 1
        if count < 1:
            raise ValueError
        return tuple(float(np.round(start + i * step, 12)) for i in range(count))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--radii {text!r} does not do: write start:stop:step such as 0:60:5, or 0,0.5,1.") from None


def probe_of(radii: str, **fields: Any) -> ProbeSpec:
    """Return the probe that the command's words mean."""
    fields["normalisation"] = choose("normalisation", fields["normalisation"], ("none", "filter"))
    fields["space"] = choose("space", fields["space"], ("baked", "latent"))
    fields["checkpoint"] = choose("checkpoint", fields["checkpoint"], ("selected", "last"))
    return ProbeSpec.make(radii=parse_radii(radii), **fields)


def chart(
    store: RunStore, found: list[Run], probe: ProbeSpec, *, split: str, out: Path
) -> tuple[pd.DataFrame, list[Path]]:
    """Tabulate and draw measured runs; write `flatness.{csv,pdf,png}`.

    Args:
        store: holds the measurements.
        found: the runs.
        probe: as measured.
        split: "source" or "target".
        out: folder of the pictures.
    """
    panel = PANELS[choose("split", split, PANELS)]
    wanted = [(f"{run.spec.label} {run.spec.digest[:6]}", run.spec, probe) for run in found]
    frame = tables.flatness(store, wanted)
    shown = frame[frame["panel"] == panel].drop(columns="panel")
    shown = shown.assign(**_lengths(found, probe, shown))
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / "flatness.csv", shown.to_csv(index=False).encode())
    return shown, [*plots.save(_draw(shown, probe, split), out / "flatness"), out / "flatness.csv"]


def _lengths(found: list[Run], probe: ProbeSpec, shown: pd.DataFrame) -> dict[str, list[float]]:
    """Return each radius as L2 distance, as a share of ||w||, and per parameter."""
    lengths: dict[str, list[float]] = {"l2": [], "share": [], "rms": []}
    for run in found:
        _, facts = files.load_arrays(run.probe(probe).result)
        for radius in probe.radii:
            distance = radius * facts["reach"]
            lengths["l2"].append(distance)
            lengths["share"].append(distance / facts["norm"])
            lengths["rms"].append(distance / facts["num_params"] ** 0.5)
    assert len(lengths["l2"]) == len(shown)
    return lengths


def _draw(shown: pd.DataFrame, probe: ProbeSpec, split: str) -> Any:
    with plots.style():
        figure, ax = plt.subplots(figsize=(3.4, 2.8), layout="constrained")
        plots.curves(ax, shown, x="radius", by="method", order=list(dict.fromkeys(shown["method"])))
        distance = "Radius γ (L2 distance)" if probe.normalisation == "none" else "Relative radius ρ"
        ax.set(
            xlabel=distance, ylabel="Flatness $F(w)$ (nats)", title=f"{split} domains, {probe.num_samples} directions"
        )
        ax.legend()
    return figure
