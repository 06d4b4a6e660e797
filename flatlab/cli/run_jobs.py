"""Jobs of a command: run with a progress bar, or printed with their cost; all figures and tables at once."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatlab.cli import checks
from flatlab.cli.choices import Choices
from flatlab.cli.errors import say
from flatlab.errors import UserError

if TYPE_CHECKING:
    from flatlab.reproduce import Reproduction

DRAWING = frozenset({"name", "draw_only", "reference", "out", "json", "debug"})  # options allowed with --draw-only


def carry_out(chosen: Choices, todo: Sequence[Any], place: Any = None) -> None:
    """Run jobs in worker processes, after decoding their images.

    Args:
        chosen: the chosen options.
        todo: the jobs.
        place: machine facts; by default as chosen.
    """
    from flatlab import reproduce
    from flatlab.cli import display

    place = place or chosen.place()
    if todo:
        checks.start(todo, place)
        for folder in (chosen.out if "out" in chosen.taken else None, chosen.tensorboard):
            if folder:  # before the work, so that an unwritable folder is reported first
                folder.mkdir(parents=True, exist_ok=True)
    _decode({(spec.dataset, spec.image_size) for job in todo for spec in job.runs}, place)
    engine = chosen.engine(len(todo))
    if todo:
        costs, source, _ = _costs(chosen, todo, todo[0].runs[0])
        display.err.print(display.summary(todo, costs, source, workers=engine.workers), soft_wrap=True, markup=False)
    with display.board(todo, workers=engine.workers) as on_event:
        reproduce.carry_out(list(todo), chosen.runs(), place, engine=engine, on_event=on_event)


def measured(chosen: Choices, found: Sequence[Any], measurements: Sequence[Any]) -> bool:
    """Measure what is missing of runs; with --dry-run, print the cost and return False."""
    from flatlab import reproduce
    from flatlab.data import catalog
    from flatlab.jobs import plan as jobs_plan
    from flatlab.store.runs import check_data

    checks.parameters(found, measurements)
    checks.corruptions(found, measurements)
    place, dataset = reproduce.place_of(list(found), chosen.place())
    check_data(found, place)
    sizes = catalog.sizes(dataset, Path(place.data_dir) if place.data_dir else None)
    wanted = [(run.spec, measurement) for run in found for measurement in measurements]
    todo = jobs_plan.missing(chosen.runs(), [], wanted, sizes=sizes)
    if not chosen.dry_run:
        carry_out(chosen, todo, place)
    elif all(getattr(measurement, "piloted", False) for measurement in measurements):
        foresee(chosen, todo, place)
    else:
        price(chosen, todo, found[0].spec)
    return not chosen.dry_run


def _decode(wanted: set[tuple[str, int]], place: Any) -> None:
    """Decode images that are not cached, before workers start, so that there is one bar and one error."""
    from flatlab.cli import display
    from flatlab.data import cache, catalog

    folder, kept = (Path(each) if each else None for each in (place.data_dir, place.cache))
    for dataset, size in sorted(wanted):
        facts = catalog.facts(dataset)
        if (facts is None or facts.folder) and not catalog.is_text(dataset):
            with display.counter(f"{dataset}: decoding images, once") as report:
                cache.prepare(dataset, data_dir=folder, image_size=size, cache=kept, report=report)


def price(chosen: Choices, todo: list[Any], spec: Any) -> None:
    """Print jobs, passes and estimated time."""
    from flatlab.cli import display

    costs, source, rate = _costs(chosen, todo, spec)
    workers = chosen.engine(len(todo)).workers
    if not chosen.json:
        display.plan(todo, costs, source, workers=workers)
        return
    rows = [
        {"name": job.name, "passes": job.passes, "core_seconds": cost} for job, cost in zip(todo, costs, strict=True)
    ]
    seconds = sum(costs) / sum(job.passes for job in todo) if todo else rate
    chosen.answer_facts({"jobs": rows, "seconds_per_pass": seconds, "source": source, "workers": workers}, "")


def _costs(chosen: Choices, todo: Sequence[Any], spec: Any) -> tuple[list[float], str, float]:
    """Return the core seconds of each job, the source of the rates, and the rate of a network without a job."""
    from flatlab.jobs import plan as jobs_plan

    kinds = dict.fromkeys((job.runs[0].model, job.runs[0].image_size) for job in todo)
    rates = jobs_plan.seconds_per_pass(chosen.runs(), kinds or [(spec.model, spec.image_size)])
    costs = [job.passes * rates[job.runs[0].model, job.runs[0].image_size][0] for job in todo]
    return costs, "; ".join(dict.fromkeys(source for _, source in rates.values())), next(iter(rates.values()))[0]


def foresee(chosen: Choices, todo: Sequence[Any], place: Any) -> None:
    """Run each measurement's pilot and print its sampling plan; the plan is stored and reused."""
    import pandas as pd

    from flatlab.jobs import plan as jobs_plan
    from flatlab.measure.runner import measure
    from flatlab.measure.sphere import foresee
    from flatlab.specs.rises import ReachSpec

    store = chosen.runs()
    wanted = [(store.run(job.runs[0]), measurement) for job in todo for measurement in job.measurements]
    for run, measurement in wanted:
        if isinstance(measurement, ReachSpec):
            measure(run, measurement, place)
    wanted = [(run, measurement) for run, measurement in wanted if not isinstance(measurement, ReachSpec)]
    rows = [row for run, measurement in wanted for row in foresee(run.measurement(measurement), run, place)]
    kinds = [(run.spec.model, run.spec.image_size) for run, _ in wanted[:1]]
    seconds, source = next(iter(jobs_plan.seconds_per_pass(store, kinds).values()), (0.0, ""))
    plans = pd.DataFrame(rows)
    if rows:
        plans["core_seconds"] = plans["images"] * seconds
    chosen.answer(plans, f"Sampling plans of the pilots; seconds are {source}", {"core_seconds": ".1f"})


def show_written(paths: Sequence[Path], sentences: Sequence[str] = (), unchanged: Sequence[Path] = ()) -> None:
    """Print sentences, and the names of the files written and of those that were left as they are."""
    for sentence in sentences:
        say(sentence, mark="")
    say(f"Written: {', '.join(map(str, paths))}", mark="")
    if unchanged:
        say(f"Unchanged: {', '.join(map(str, unchanged))}", mark="")


def by_stem(paths: Sequence[Path]) -> list[Path]:
    """Return one path for the files of each name: fig3.{csv,json,md,pdf,png}."""
    suffixes: dict[Path, list[str]] = {}
    for path in paths:
        suffixes.setdefault(path.with_suffix(""), []).append(path.suffix.removeprefix("."))
    joined = {stem: ",".join(sorted(each)) for stem, each in suffixes.items()}
    return [
        stem.with_name(f"{stem.name}.{{{each}}}" if "," in each else f"{stem.name}.{each}")
        for stem, each in joined.items()
    ]


def redraw(chosen: Choices, name: str, *, reference: bool) -> None:
    """Draw a figure or table again, or all of them, from the files in the folder of the pictures."""
    from flatlab import reproduce

    chosen.refuse(sorted(chosen.written - DRAWING), "with --draw-only")
    figures = reproduce.in_all().values() if name == "all" else [reproduce.analysis(name)]
    written, failed = [], []
    for figure in figures:
        try:
            written += reproduce.redraw(figure, chosen.out, reference=reference).written
        except UserError as error:
            failed.append(str(error))
    if chosen.json:
        chosen.answer_facts({"written": list(map(str, written))}, "")
    elif written:
        show_written(by_stem(written) if name == "all" else written)
    if failed:
        raise UserError(*failed)


def everything(chosen: Choices, *, reference: bool) -> None:
    """Make all figures and tables except those made alone; shared work is done once, and can be resumed.

    A failure does not stop the rest; the command then ends with the errors.

    Args:
        chosen: the chosen options.
        reference: also write the small files that the repository keeps.
    """
    import pandas as pd

    from flatlab import reproduce

    setting, store, place = chosen.make_setting(), chosen.runs(), chosen.place()
    figures = reproduce.in_all()
    todo = reproduce.missing_of(figures.values(), setting, store, place)
    if chosen.dry_run:
        price(chosen, todo, setting)
        return
    started = time.monotonic()
    failed: list[str] = []
    try:
        carry_out(chosen, todo)
    except UserError as error:
        failed.append(str(error))
    rows, written, unchanged = [], [], []
    for name, figure in figures.items():
        try:
            row, done = _made(chosen, figure, reference=reference)
            written += done.written
            unchanged += done.unchanged
            rows.append({**row, **done.paths()} if chosen.json else row)
        except UserError as error:
            failed.append(f"{name}: {error}")
            rows.append({"name": name, "made": "no"})
    made = sum(row["made"] == "yes" for row in rows)
    title = f"Setting {setting.name}: {made} made in {time.monotonic() - started:.0f} s; costs in seconds"
    chosen.answer(pd.DataFrame(rows), title, {"trained": ".0f", "measured": ".0f", "drawn": ".1f"})
    if written and not chosen.json:
        show_written(by_stem(written), unchanged=by_stem(unchanged))
    if failed:
        raise UserError(*failed)


def _made(chosen: Choices, figure: Any, *, reference: bool) -> tuple[dict[str, Any], "Reproduction"]:
    """Write one figure or table; return its cost and its comparison with the paper, and all of it."""
    from flatlab import reproduce

    name, started = figure.name, time.monotonic()
    words = zip(sys.argv[1:], sys.argv, strict=False)  # each with the one before: `--held-out all` stays
    redo = shlex.join(["flatlab", *(name if word == "all" and left != "--held-out" else word for word, left in words)])
    setting, store = chosen.make_setting(), chosen.runs()
    done = reproduce.write(figure, setting, store, out=chosen.out, redo=redo, reference=reference)
    cost = {"trained": done.cost["training_seconds"], "measured": done.cost["measuring_seconds"]}
    against = " ".join(remark for remark in done.remarks if "paper" in remark)
    row = {"name": name, "made": "yes", **cost, "drawn": time.monotonic() - started, "against the paper": against}
    return row, done
