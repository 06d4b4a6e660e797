"""`flatlab noise`: is the quantization noise of trained runs uniform, symmetric, a typical direction?"""

from typing import Annotated

import typer

from flatlab.errands import measured, tell_written
from flatlab.options import Choices
from flatlab.words import Runs


def noise(
    chosen: Choices,
    runs: Runs,
    radius: Annotated[bool, typer.Option("--radius", help="What 8 to 2 bits do to the loss, of any run.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="Only weights that match, as 'features.0*' (some are drawn, all are rounded).")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
    samples: Annotated[int | None, typer.Option(help="Random directions a bit width (100), with --radius.")] = None,
    images: Annotated[int | None, typer.Option(help="At most so many of each domain (all), with --radius.")] = None,
) -> None:
    """Is quantization noise uniform and symmetric (QT-DoG Figs. 2, 8), is it a typical direction (--radius)?"""
    from flatlab import checks, rounding, uniformity

    store, room = chosen.runs(), rounding if radius else uniformity
    found = chosen.found(runs)
    probe = room.probe_of(found, layers=layers, checkpoint=checkpoint, samples=samples, images=images)
    if not radius:
        checks.layers(found, layers, probe.checkpoint)
    if not measured(chosen, found, [probe]):
        return
    table, written = room.chart(store, found, probe, layers=layers, out=chosen.out)
    chosen.answer(table if chosen.json else table[list(room.SHOWN)], room.TITLE, room.SHOWN)
    tell_written(written)
