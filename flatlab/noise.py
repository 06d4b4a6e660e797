"""`flatlab noise`: is the quantization noise of trained runs uniform, symmetric, a typical direction?"""

from pathlib import Path
from typing import Annotated

import typer

from flatlab.errands import carry_out, price, tell_written
from flatlab.options import Choices


def noise(
    chosen: Choices,
    runs: Annotated[list[str], typer.Argument(help="Digests of runs, or their beginnings (`flatlab runs list`).")],
    radius: Annotated[bool, typer.Option("--radius", help="What 8 to 2 bits do to the loss, of any run.")] = False,
    layers: Annotated[
        str | None, typer.Option(help="Only weights that match, as 'features.0*' (some are drawn, all are rounded).")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
    samples: Annotated[int | None, typer.Option(help="Random directions a bit width (100), with --radius.")] = None,
    images: Annotated[int | None, typer.Option(help="At most so many of each domain (all), with --radius.")] = None,
) -> None:
    """Is quantization noise uniform and symmetric (QT-DoG Figs. 2, 8), is it a typical direction (--radius)?"""
    from flatlab import flatness, jobs, reproduce, rounding, uniformity
    from flatlab.data import catalog

    store, room = chosen.runs(), rounding if radius else uniformity
    found = flatness.finished(store, runs)
    place, dataset = reproduce.place_of(found, chosen.place())
    probe = room.probe_of(found, layers=layers, checkpoint=checkpoint, samples=samples, images=images)
    sizes = catalog.sizes(dataset, Path(place.data_dir) if place.data_dir else None)
    todo = jobs.missing(store, [], [(run.spec, probe) for run in found], sizes=sizes)
    if chosen.dry_run:
        price(chosen, todo, found[0].spec)
        return
    carry_out(chosen, todo, place)
    table, written = room.chart(store, found, probe, layers=layers, out=chosen.out)
    chosen.answer(table if chosen.json else table[list(room.SHOWN)], room.TITLE, room.SHOWN)
    tell_written(written)
