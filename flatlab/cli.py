"""The command line: each command parses, calls one function, and prints; torch is loaded by workers, not here."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flatlab.options import DATA, RUNNING, TRAINING, Choices, takes

HELP = """How flat is this minimum, is that one flatter, and does it matter out of domain?

Begin with `flatlab reproduce fig3`: it trains five methods on embedded data, measures how flat their minima are, and
draws Figure 3 of QT-DoG (arXiv 2410.06020) with error bands. Every command can be stopped and called again."""

app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
runs_app = typer.Typer(help="Look at the runs of a store, and keep it in order.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from flatlab import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
@takes(*DATA, *TRAINING, *RUNNING, "out")
def reproduce(chosen: Choices, name: Annotated[str, typer.Argument(help="fig3, ... (`flatlab list`).")]) -> None:
    """Redo a figure or table of the paper: train and measure what is missing, tabulate, draw."""
    from flatlab import display, reproduce

    setting, store, place = chosen.setting(), chosen.runs(), chosen.place()
    module = reproduce.analysis(name)
    todo = reproduce.missing(module, setting, store, place)
    if chosen.dry_run:
        _price(chosen, todo, setting.model)
        return
    with display.board(todo) as hear:
        reproduce.carry_out(todo, store, place, workers=chosen.processes(), hear=hear)
    done = reproduce.write(module, setting, store, out=chosen.out, redo=shlex.join(["flatlab", *sys.argv[1:]]))
    if chosen.json:
        typer.echo(
            json.dumps({"written": [str(path) for path in done.written], "findings": done.findings.to_dict("records")})
        )
        return
    display.frame(module.summary(done.findings), module.SUMMARY)
    display.out.print(f"Written: {', '.join(str(path) for path in done.written)}", soft_wrap=True)


@app.command()
@takes(*DATA, "method", "objective", "step", "average", "quantizer", *TRAINING, *RUNNING, seeds=1)
def train(chosen: Choices) -> None:
    """Train a method, or any composition of parts, with each domain held out in turn or one of them."""
    from flatlab import display, jobs, methods, reproduce, tables
    from flatlab.data import catalog

    setting, store, place = chosen.setting(), chosen.runs(), chosen.place()
    label, parts = methods.method(chosen.method)
    changes = {part: getattr(chosen, part) for part in methods.PARTS if getattr(chosen, part) is not None}
    wanted = methods.replicates(methods.vary(parts, changes), setting)
    label += "".join(f", {part} {value}" for part, value in changes.items())
    todo = jobs.missing(store, wanted, [], sizes=catalog.sizes(setting.dataset, chosen.folder()))
    if chosen.dry_run:
        _price(chosen, todo, setting.model)
        return
    with display.board(todo) as hear:
        reproduce.carry_out(todo, store, place, workers=chosen.processes(), hear=hear)
    table = tables.accuracies(store, [(label, spec) for spec in wanted])
    _show(
        chosen,
        table,
        "Accuracy on source validation and target, by selection rule",
        {"validation": ".3f", "target": ".3f"},
    )


@app.command()
@takes("data_dir", *RUNNING, "out", "seed")
def flatness(
    chosen: Choices,
    runs: Annotated[list[str], typer.Argument(help="Digests of runs, or their beginnings (`flatlab runs list`).")],
    radii: Annotated[
        str, typer.Option(help="start:stop:step, the end included, or a comma-separated list.")
    ] = "0:60:5",
    samples: Annotated[int, typer.Option(help="Directions.")] = 100,
    split: Annotated[str, typer.Option(help="source (the seen domains) or target (the unseen one).")] = "source",
    normalisation: Annotated[
        str, typer.Option(help="none: L2 distance; filter: share of each filter's norm.")
    ] = "none",
    space: Annotated[str, typer.Option(help="Of a quantized run: baked (plain weights), or latent.")] = "baked",
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
    params: Annotated[
        str | None, typer.Option(help="Only parameters whose names match, such as 'features.0*'.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="At most so many images of each domain.")] = None,
) -> None:  # the options of a measurement are its own, hence so many
    """Measure how fast the loss rises around trained runs: F on spheres (QT-DoG Eq. 5), with intervals."""
    from flatlab import display, jobs, reproduce
    from flatlab.data import catalog
    from flatlab.flatness import chart, probe_of

    store = chosen.runs()
    found = [store.find(digest) for digest in runs]
    probe = probe_of(
        radii,
        num_samples=samples,
        normalisation=normalisation,
        space=space,
        checkpoint=checkpoint,
        params=params,
        images=images,
        seed=chosen.seed or 0,
    )
    place, dataset = reproduce.place_of(found, chosen.place())
    sizes = catalog.sizes(dataset, Path(place.data_dir) if place.data_dir else None)
    todo = jobs.missing(store, [], [(run.spec, probe) for run in found], sizes=sizes)
    if chosen.dry_run:
        _price(chosen, todo, found[0].spec.model)
        return
    with display.board(todo) as hear:
        reproduce.carry_out(todo, store, place, workers=chosen.processes(), hear=hear)
    table, written = chart(store, found, probe, split=split, out=chosen.out)
    _show(
        chosen,
        table,
        "Flatness, with 95 % intervals over directions",
        dict.fromkeys(("value", "stderr", "low", "high"), ".4g"),
    )
    display.err.print(f"Written: {', '.join(str(path) for path in written)}", soft_wrap=True)


@app.command("import")
@takes(*DATA, "model", "freeze_batchnorm", "trial_seed", "device", "store", "json", "debug")
def import_(
    chosen: Choices, file: Annotated[Path, typer.Argument(help=".safetensors, or .pth without pickled code.")]
) -> None:
    """Take a checkpoint trained elsewhere (torchvision's, DomainBed's or SWAD's names) into the store as a run."""
    from flatlab import tables
    from flatlab.train.imported import import_checkpoint

    spec = import_checkpoint(file, chosen.setting(), chosen.runs(), chosen.place())
    _show(
        chosen,
        tables.accuracies(chosen.runs(), [("imported", spec)]),
        f"Run {spec.digest}",
        {"validation": ".3f", "target": ".3f"},
    )


@runs_app.command("list")
@takes("store", "json", "debug")
def list_runs(chosen: Choices) -> None:
    """List the runs of a store."""
    from flatlab import tables

    _show(
        chosen, tables.overview(chosen.runs()), f"Runs in {chosen.runs().root}", {"validation": ".3f", "target": ".3f"}
    )


@runs_app.command()
@takes("store", "debug")
def show(chosen: Choices, run: Annotated[str, typer.Argument(help="Digest or its beginning.")]) -> None:
    """Print a run's spec, provenance and log as JSON."""
    found = chosen.runs().find(run)
    told = {"spec": found.spec.model_dump(mode="json"), "done": found.done, "provenance": found.provenance}
    told["probes"] = {probe.path.name: probe.spec.model_dump(mode="json") for probe in found.probes()}
    typer.echo(json.dumps({**told, "log": found.rows()}, indent=1))


@runs_app.command()
@takes("store", "debug")
def verify(chosen: Choices) -> None:
    """Compare every finished file with its recorded hash; exit with 1 where one is damaged or missing."""
    from flatlab import display

    store = chosen.runs()
    faults = store.faults()
    for fault in faults:
        display.out.print(fault, soft_wrap=True)
    display.out.print(f"{len(store.runs())} runs in {store.root}, {len(faults)} faults.")
    if faults:
        raise typer.Exit(1)


@runs_app.command()
@takes("store", "debug")
def rm(chosen: Choices, runs: Annotated[list[str], typer.Argument(help="Digests or their beginnings.")]) -> None:
    """Delete runs with their measurements."""
    from flatlab import display

    for run in [chosen.runs().find(digest) for digest in runs]:
        chosen.runs().remove(run)
        display.out.print(f"Removed {run.path}.")


@runs_app.command()
@takes("store", "debug")
def merge(chosen: Choices, other: Annotated[Path, typer.Argument(help="Folder of the other store.")]) -> None:
    """Copy the finished runs and measurements of another store into this one."""
    from flatlab import display
    from flatlab.runs import RunStore

    counts = chosen.runs().merge(RunStore(other))
    display.out.print(", ".join(f"{count} {what}" for what, count in counts.items()) + ".")


@data_app.command("list")
@takes("json", "debug")
def list_data(chosen: Choices) -> None:
    """List the data sets that are known by name."""
    import pandas as pd

    from flatlab.data.catalog import CATALOG

    rows = [{"name": name, "domains": ", ".join(facts.domains)} for name, facts in CATALOG.items()]
    _show(chosen, pd.DataFrame(rows), "Data sets; any other in the same layout: --dataset folder:PATH")


@data_app.command()
@takes("data_dir", "json", "debug")
def check(chosen: Choices, dataset: Annotated[str, typer.Argument(help="PACS, ..., or folder:PATH.")]) -> None:
    """Compare a data set on disk with what is known of it: domains, classes, counts."""
    import pandas as pd

    from flatlab.data import sources

    named = Choices({**chosen.given, "dataset": dataset})
    rows = sources.check(named.name(), named.folder())
    _show(chosen, pd.DataFrame([{**row._asdict(), "ok": row.ok} for row in rows]), dataset)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


@app.command()
@takes("json", "debug")
def methods(chosen: Choices) -> None:
    """List the methods and what they are composed of."""
    import pandas as pd

    from flatlab.methods import METHODS

    rows = [{"method": name, **dataclasses.asdict(parts)} for name, parts in METHODS.items()]
    _show(chosen, pd.DataFrame(rows), "Methods; any other composition: --objective --step --average --quantizer")


@app.command("list")
@takes(*DATA, *TRAINING, "store", "device", "json", "debug")
def list_(chosen: Choices) -> None:
    """List the figures and tables that can be reproduced, and what is missing to make them."""
    import pandas as pd

    from flatlab import reproduce

    setting, store, place = chosen.setting(), chosen.runs(), chosen.place()
    rows = []
    for name in reproduce.analyses():
        module = reproduce.analysis(name)
        todo = reproduce.missing(module, setting, store, place)
        rows.append({"name": name, "shows": (module.__doc__ or "").splitlines()[0], "missing": f"{len(todo)} jobs"})
    _show(chosen, pd.DataFrame(rows), f"Figures and tables, setting {setting.name}")


@app.command()
@takes("device", "debug")
def doctor(chosen: Choices) -> None:
    """Say what this machine computes with, and what would make it faster."""
    from flatlab import display
    from flatlab.doctor import diagnose

    for line in diagnose(chosen.place()):
        display.out.print(line, soft_wrap=True)


def _price(chosen: Choices, todo: list[Any], model: str) -> None:
    from flatlab import display, jobs

    seconds, source = jobs.seconds_per_pass(chosen.runs(), model)
    display.plan(todo, seconds, source, workers=chosen.processes())


def _show(chosen: Choices, table: Any, title: str, formats: dict[str, str] | None = None) -> None:
    """Print a frame as a table, or as JSON where that was asked for."""
    from flatlab import display

    if chosen.json:
        typer.echo(table.to_json(orient="records"))
    else:
        display.frame(table, title, formats=formats)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
