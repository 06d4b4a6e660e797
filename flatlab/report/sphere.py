"""`flatlab flatness`: from words to a measurement, and from measured runs to a table and a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd

from flatlab import files, plots
from flatlab.errors import UserError, choose
from flatlab.report import panels, tables
from flatlab.results import verdicts
from flatlab.results.estimate import Estimate, FloatArray, estimate
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
    shown = shown.assign(**_lengths(found, measurement, shown))
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
    mine = panels.masks(facts["strata"], run.spec.held_out)[panel]
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
            title=f"{panels.TITLES[panel].capitalize()}, {measurement.effort}",
        )
        ax.legend()
    return figure
