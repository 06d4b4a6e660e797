"""Surfaces and lines of runs, as tables and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from flatlab import plots
from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.report import panels
from flatlab.results.connectivity import Connection, Connections
from flatlab.results.surface import Surface
from flatlab.specs.measurements import ConnectionSpec, SurfaceSpec
from flatlab.store.runs import Run

BARRIERS = {"panel": "", "barrier": ".4g", "low": ".4g", "high": ".4g", "position": ".3f", "distance": ".4g"}
ALIKE = ("model", *panels.IMAGES, "corruption")
OWN = "BatchNorm's statistics are those of the run in the origin: at another checkpoint's mark the loss is not its own."
MIXED = "BatchNorm's statistics are interpolated like the weights: both ends are the checkpoints."
RECOMPUTED = "BatchNorm's statistics are recomputed at each place, from up to {} training images of each source domain."
BAND = "Band: 95 % over images, of the height above the dashed line; the barrier's place is chosen on other images."


def centres(found: Sequence[Run], axes: str) -> tuple[list[Run], tuple[str, ...]]:
    """Return the runs at the centres of the surfaces, and the digests of those that span the planes, or end the line.

    Args:
        found: the named runs.
        axes: "runs": one plane, through three runs (around the first) or of a trajectory (around the last); "line":
            from the first to the second.

    Raises:
        UserError: if too few runs are named, or runs that differ in data or architecture.
    """
    if axes not in ("runs", "line"):
        return list(found), ()
    if axes == "line" and len(found) != 2:
        raise UserError(f"--axes line needs two runs, got {len(found)}.")
    if axes == "runs" and len(found) < 3:
        raise UserError(f"--axes runs needs at least three runs, got {len(found)}.")
    _check_alike(found, axes)
    if len(found) <= 3:
        return [found[0]], tuple(run.spec.digest for run in found[1:])
    return [found[-1]], tuple(run.spec.digest for run in found)


def _check_alike(found: Sequence[Run], axes: str) -> None:
    """Refuse runs that no line or plane can contain: of different weights, or with different images."""
    for field in ALIKE:
        values = [getattr(run.spec, field) for run in found]
        if odd := next((run for run, value in zip(found, values, strict=True) if value != values[0]), None):
            raise UserError(
                f"--axes {axes} needs runs of one architecture on the same data, but {field} is {values[0]} of "
                f"{found[0].name} and {getattr(odd.spec, field)} of {odd.name}: name runs that share it."
            )


def steps_between(found: Sequence[Run], axes: str, every: int | None) -> int | None:
    """Return the steps between the checkpoints that span the planes of trajectories; None for other axes.

    Args:
        found: the runs.
        axes: as requested.
        every: the requested number of steps; None: that of the first run.

    Raises:
        UserError: if a run has not kept them, or a number is given for other axes.
    """
    if axes == "trajectory":
        every = found[0].kept_each(every)
        for run in found[1:]:
            run.kept_each(every)
    elif every is not None:
        raise UserError(f"--every is for --axes trajectory; with --axes {axes} there are no steps: leave it out.")
    return every


def of_panel(found: Surface, panel: str, held_out: str) -> FloatArray:
    """Return the loss (G1, G2) on the source domains, with equal weights, or on the held-out one."""
    return found.of("loss", panels.strata_of(found.strata, panel, held_out))


def draw_surfaces(found: Sequence[Run], measurement: SurfaceSpec, *, out: Path) -> list[Path]:
    """Draw contours of each run on both panels, with common levels, and a relief; write npz and pictures."""
    import matplotlib.pyplot as plt

    surfaces = {run.spec.digest: run.result(measurement) for run in found}
    values = {
        (run.spec.digest, panel): of_panel(surfaces[run.spec.digest], panel, run.spec.held_out)
        for run in found
        for panel in panels.TITLES
    }
    levels, written = plots.contour_levels(values.values()), []
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        rows = len(found)
        figure = plt.figure(figsize=(9.0, 3.0 * rows + 0.4), layout="constrained")
        for row, run in enumerate(found):
            mine = surfaces[run.spec.digest]
            for column, (panel, title) in enumerate(panels.TITLES.items()):
                ax = figure.add_subplot(rows, 3, 3 * row + column + 1)
                filled = plots.contours(ax, (mine.x, mine.y), values[run.spec.digest, panel], levels=levels)
                plots.marked(ax, mine.marks, mine.mark_labels, connected=mine.connected)
                ax.set(xlabel=mine.labels[0], ylabel=mine.labels[1], title=f"{run.name}, {title}")
            figure.colorbar(filled, ax=ax, label="loss (nats)", format="%.2g")
            relief: Any = figure.add_subplot(rows, 3, 3 * row + 3, projection="3d")
            plots.relief(relief, (mine.x, mine.y), values[run.spec.digest, panels.SOURCE], levels=levels)
            relief.set(title=f"{run.name}, {panels.TITLES[panels.SOURCE]}")
            mine.save(out / f"landscape-{run.spec.digest[:6]}.npz")
            written.append(out / f"landscape-{run.spec.digest[:6]}.npz")
        if sentences := remarks(found, measurement):
            figure.suptitle("\n".join(sentences), fontsize=8)
        return [*plots.save(figure, out / "landscape"), *written]


def remarks(found: Sequence[Run], measurement: SurfaceSpec | ConnectionSpec) -> list[str]:
    """Return sentences for a caption: on BatchNorm's statistics, and on the variance explained by a plane."""
    sentences = [f"Images{measurement.under}."] if measurement.corruption else []
    if isinstance(measurement, SurfaceSpec) and measurement.axes == "trajectory":
        for run in found:
            mine: Surface = run.result(measurement)
            sentences.append(
                f"{run.name}: the plane explains {mine.explained.sum():.1%} of the variance of {len(mine.marks)}"
                f" checkpoints, each {measurement.every} steps, and is at most"
                f" {mine.distances.max():.3g} from them (L2)."
            )
    if measurement.recompute is not None:
        sentences.append(RECOMPUTED.format(measurement.recompute))
    elif isinstance(measurement, ConnectionSpec):
        sentences.append(MIXED)
    elif measurement.spanned:
        sentences.append(OWN)
    return sentences


def draw_line(
    ends: tuple[Run, Run], measurement: ConnectionSpec, *, out: Path
) -> tuple[pd.DataFrame, list[str], list[Path]]:
    """Tabulate and draw the straight line between two runs; write `connection.{csv,pdf,png}` and an npz for each panel.

    Args:
        ends: the two; the line was measured at the first.
        measurement: as measured.
        out: folder of the pictures.

    Returns:
        A row for each panel with the barrier (nats) and its interval; sentences; the written files.
    """
    import matplotlib.pyplot as plt

    run, other = ends
    sentences, written = [], []
    lines: Connections = run.result(measurement)
    out.mkdir(parents=True, exist_ok=True)
    with plots.style():
        figure, grid = plt.subplots(1, len(panels.TITLES), figsize=(6.9, 3.0), layout="constrained")
        for ax, (panel, found) in zip(lines.plot(grid), lines.panels.items(), strict=True):
            title = panels.TITLES[panel]
            sentences.append(f"{title.capitalize()}: {barrier_sentence(found)}")
            ax.set_title(f"{title}; {run.name} to {other.name}", pad=18)  # the legend is between
            written.append(out / f"connection-{run.spec.digest[:6]}-{other.spec.digest[:6]}-{panel}.npz")
            found.save(written[-1])
        figure.suptitle("\n".join([BAND, *remarks([run], measurement)]), fontsize=8)
    pictures = plots.save(figure, out / "connection", lines.to_frame())
    return lines.barriers(), [*sentences, *remarks([run], measurement)], [*pictures, *written]


def barrier_sentence(found: Connection) -> str:
    """Return a sentence on the barrier with its interval, and on whether it is significant."""
    low, high = (float(end[0]) for end in found.interval())
    if not np.isfinite(found.barrier):
        verdict = "the loss is not finite somewhere on it"
    elif low > 0:
        verdict = "there is a barrier between the two"
    elif high < 0:
        verdict = "no barrier: the line lies below the interpolation of its ends"
    else:
        verdict = "no barrier is established on these images"
    return (
        f"the line is {found.barrier:.3g} nats [{low:.3g}, {high:.3g}] above the interpolation of its ends at "
        f"{found.position:.0%} of the way ({found.length:.3g} in all, L2): {verdict}."
    )
