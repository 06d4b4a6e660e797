"""What commands have done for them: jobs carried out under a bar, or priced and foreseen; and their last words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from flatlab.jsontext import strict_json
from flatlab.mistakes import say
from flatlab.options import Choices


def carry_out(chosen: Choices, todo: Sequence[Any], place: Any = None) -> None:
    """Do jobs in worker processes, images decoded first.

    Args:
        chosen: what the user chose.
        todo: the jobs.
        place: where; as chosen, if not given.
    """
    from flatlab import display, reproduce

    place = place or chosen.place()
    _decode({(spec.dataset, spec.image_size) for job in todo for spec in job.runs}, place)
    with display.board(todo) as hear:
        processes = chosen.processes(len(todo))
        reproduce.carry_out(list(todo), chosen.runs(), place, workers=processes, hear=hear)


def _decode(wanted: set[tuple[str, int]], place: Any) -> None:
    """Bring images into the cache where they are not, before workers start: here it is one bar, and one mistake."""
    from flatlab import display
    from flatlab.data import cache, catalog

    folder, kept = (Path(each) if each else None for each in (place.data_dir, place.cache))
    for dataset, size in sorted(wanted):
        facts = catalog.facts(dataset)
        if facts is None or facts.folder:
            with display.counter(f"{dataset}: decoding images, once") as report:
                cache.prepare(dataset, data_dir=folder, image_size=size, cache=kept, report=report)


def price(chosen: Choices, todo: list[Any], spec: Any) -> None:
    """Say jobs, passes and estimated time; nothing is begun."""
    from flatlab import display, jobs

    seconds, source = jobs.seconds_per_pass(chosen.runs(), spec.model, spec.image_size)
    workers = chosen.processes(len(todo))
    if not chosen.json:
        display.plan(todo, seconds, source, workers=workers)
        return
    rows = [{"name": job.name, "passes": job.passes, "core_seconds": job.passes * seconds} for job in todo]
    typer.echo(strict_json({"jobs": rows, "seconds_per_pass": seconds, "source": source, "workers": workers}))


def foresee(chosen: Choices, todo: Sequence[Any], place: Any) -> None:
    """Fly the pilots of measurements, and say what they plan; the plans are kept, and the measurements keep to them."""
    import pandas as pd

    from flatlab import jobs
    from flatlab.measures.sphere import foresee

    store = chosen.runs()
    wanted = [(store.run(job.runs[0]), probe) for job in todo for probe in job.probes]
    rows = [row for run, probe in wanted for row in foresee(run.probe(probe), run, place)]
    first = wanted[0][0].spec if wanted else None
    seconds, source = jobs.seconds_per_pass(store, first.model, first.image_size) if first else (0.0, "")
    plans = pd.DataFrame(rows)
    if rows:
        plans["core_seconds"] = plans["images"] * seconds
    chosen.answer(plans, f"What the pilots plan; seconds are {source}", {"core_seconds": ".1f"})


def tell_written(paths: Sequence[Path], sentences: Sequence[str] = ()) -> None:
    """Say what was found, in sentences, and which files were written."""
    for sentence in sentences:
        say(sentence, mark="")
    say(f"Written: {', '.join(map(str, paths))}", mark="")
