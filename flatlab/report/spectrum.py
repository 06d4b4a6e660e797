"""Measured spectra as tidy frames, and `flatlab hessian`'s picture. Torch-free."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.arguments import FloatArray
from flatlab.report import tables
from flatlab.report.panels import TITLES
from flatlab.results.spectrum import MeasuredSpectrum, SpectralDensity, blur
from flatlab.specs.measurements import SpectrumSpec
from flatlab.specs.run import RunSpec
from flatlab.store.runs import Run, RunStore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Wanted = Iterable[tuple[str, RunSpec, SpectrumSpec]]
PLACES = 120  # of a density's grid
WIDTH = 0.01  # of a kernel, as a share of the range
FAINT = 1e-6  # density below which nothing is drawn


def numbers(store: RunStore, wanted: Wanted) -> pd.DataFrame:
    """Return a row for each run, engine and number: eigenvalues by `index`, within residuals; the others by sampling.

    Args:
        store: contains the finished measurements.
        wanted: method's name, run, measurement.
    """
    frames = []
    for label, run, measurement in wanted:
        found: MeasuredSpectrum = store.run(run).result(measurement, label)
        about = {**_named(label, run, measurement), "engine": measurement.engine}
        frames.append(tables.of(about, found.to_frame()))
    return pd.concat(frames, ignore_index=True)


def densities(store: RunStore, wanted: Wanted) -> pd.DataFrame:
    """Return a row for each run and place of a grid that all runs of a panel share: the density of eigenvalues there.

    Args:
        store: contains the finished measurements, by flatlab's engine.
        wanted: method's name, run, measurement.
    """
    found = [
        (label, run, measurement, _rules(label, store.run(run), measurement)) for label, run, measurement in wanted
    ]
    frames = []
    for panel in dict.fromkeys(measurement.panel for _, _, measurement, _ in found):
        mine = [each for each in found if each[2].panel == panel]
        nodes = np.concatenate([nodes for *_, rules in mine for nodes, _ in rules])
        sigma = WIDTH * float(np.ptp(nodes)) or 1e-12
        grid = np.linspace(nodes.min() - 4 * sigma, nodes.max() + 4 * sigma, PLACES)
        for label, run, measurement, rules in mine:
            value = np.mean([blur(grid, *rule, sigma=sigma) for rule in rules], axis=0)
            frames.append(pd.DataFrame({"place": grid, "value": value}).assign(**_named(label, run, measurement)))
    return pd.concat(frames, ignore_index=True)


def _named(label: str, run: RunSpec, measurement: SpectrumSpec) -> dict[str, Any]:
    return {"panel": measurement.panel, "method": label, "held_out": run.held_out, "seed": run.seed}


def _rules(label: str, run: Run, measurement: SpectrumSpec) -> list[tuple[FloatArray, FloatArray]]:
    density: SpectralDensity = run.result(measurement, label).density
    return list(zip(density.nodes, density.weights, strict=True))


def chart(store: RunStore, wanted: list[tuple[str, RunSpec, SpectrumSpec]], out: Path) -> list[Path]:
    """Draw the densities of measured runs, and write all numbers: `hessian.{pdf,png,csv}`.

    Args:
        store: contains the measurements.
        wanted: method's name, run, measurement.
        out: folder of the pictures.
    """
    ours = [each for each in wanted if each[2].engine == "flatlab"]
    return plots.save(_draw(densities(store, ours)), out / "hessian", numbers(store, wanted))


def _draw(frame: pd.DataFrame) -> "Figure":
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(frame["panel"]))
    order = list(dict.fromkeys(frame["method"]))
    with plots.style():
        size = (3.4 * len(panels), 2.8)
        figure, grid = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        for ax, panel in zip(grid[0], panels, strict=True):
            lines(ax, frame[frame["panel"] == panel], order)
            ax.set(title=f"{TITLES.get(panel, panel).capitalize()}: density of the Hessian's eigenvalues")
            ax.legend()
    return figure


def lines(ax: "Axes", frame: pd.DataFrame, order: Iterable[str]) -> None:
    """Draw the density of each method over the eigenvalue, on a logarithmic axis.

    Args:
        ax: the axes.
        frame: rows with `place`, `value` and `method`; of one panel.
        order: the methods.
    """
    for index, name in enumerate(order):
        mine = frame[frame["method"] == name].sort_values("place")
        ax.semilogy(mine["place"], mine["value"].clip(lower=FAINT), color=f"C{index % 10}", label=name, linewidth=0.9)
    ax.set(xlabel="eigenvalue (nats)", ylabel="density", ylim=(FAINT, None))
