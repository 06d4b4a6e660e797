"""`flatlab runs` and `flatlab data`: looking after a store and its data sets."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flatlab.errors import UserError
from flatlab.jsontext import strict_json
from flatlab.mistakes import Commands
from flatlab.options import Choices, takes
from flatlab.words import NAMED, OneRun, Runs

runs_app = Commands(help="Look at the runs of a store, and keep it in order.", no_args_is_help=True)
data_app = Commands(help="Look at data sets.", no_args_is_help=True)


@runs_app.command("list", epilog="Example: `flatlab runs list --store runs`")
@takes("store", "json", "debug")
def list_runs(chosen: Choices) -> None:
    """List the runs of a store."""
    from flatlab import tables

    store = chosen.runs()
    if not store.runs() and not chosen.json:
        typer.echo(f"No runs in {store.root} yet: `flatlab train` makes some, and --store names another folder.")
        return
    chosen.answer(tables.overview(store), f"Runs in {store.root}", {"validation": ".3f", "target": ".3f"})


@runs_app.command(epilog="Example: `flatlab runs show 3f2a`")
@takes(*NAMED, "store", "json", "debug")
def show(chosen: Choices, run: OneRun) -> None:
    """Print a run's spec, provenance and log, always as JSON."""
    (found,) = chosen.named([run])
    told = {"spec": found.spec.model_dump(mode="json"), "done": found.done, "provenance": found.provenance}
    told["kept"] = list(found.kept())
    told["probes"] = {probe.path.name: probe.spec.model_dump(mode="json") for probe in found.probes()}
    typer.echo(strict_json({**told, "log": found.rows()}, indent=1))


@runs_app.command(epilog="Example: `flatlab runs verify --store runs`")
@takes("store", "json", "debug")
def verify(chosen: Choices) -> None:
    """Compare every finished file with its recorded hash; exit with 1 where one is damaged or missing."""
    store = chosen.runs()
    faults, count = store.faults(), len(store.runs())
    sentence = "\n".join([*faults, f"{count} runs in {store.root}, {len(faults)} faults."])
    chosen.answer_facts({"runs": count, "faults": faults}, sentence)
    if faults:
        raise typer.Exit(1)


@runs_app.command(epilog="Example: `flatlab runs rm 3f2a 77c1`")
@takes(*NAMED, "store", "json", "debug")
def rm(chosen: Choices, runs: Runs) -> None:
    """Delete runs with their measurements."""
    store = chosen.runs()
    found = chosen.named(runs)
    for run in found:
        store.remove(run)
    removed = [str(run.path) for run in found]
    chosen.answer_facts({"removed": removed}, f"Removed {', '.join(removed)}.")


@runs_app.command(epilog="Example: `flatlab runs merge /elsewhere/runs`")
@takes("store", "json", "debug")
def merge(chosen: Choices, other: Annotated[Path, typer.Argument(help="Folder of the other store.")]) -> None:
    """Copy the finished runs and measurements of another store into this one."""
    from flatlab.runs import RunStore

    if other.resolve() == chosen.runs().root.resolve():
        raise UserError(f"{other} is this store; name another one to merge, or another --store.")
    counts = chosen.runs().merge(RunStore(other))
    chosen.answer_facts(counts, ", ".join(f"{count} {what}" for what, count in counts.items()) + ".")


@data_app.command("list", epilog="Example: `flatlab data list`")
@takes("json", "debug")
def list_data(chosen: Choices) -> None:
    """List the data sets that are known by name."""
    import pandas as pd

    from flatlab.data.catalog import CATALOG

    rows = [{"name": name, "domains": ", ".join(facts.domains)} for name, facts in CATALOG.items()]
    chosen.answer(pd.DataFrame(rows), "Data sets; any other in the same layout: --dataset folder:PATH")


@data_app.command(epilog="Example: `flatlab data check PACS --data-dir /data`")
@takes("data_dir", "json", "debug")
def check(chosen: Choices, dataset: Annotated[str, typer.Argument(help="PACS, ..., or folder:PATH.")]) -> None:
    """Compare a data set on disk with what is known of it: domains, classes, counts; exit with 1 where they differ."""
    import pandas as pd

    from flatlab.data import catalog, folders

    named = replace(chosen, given={**chosen.given, "dataset": dataset})
    if chosen.data_dir:
        catalog.place(named.name(), chosen.data_dir)  # embedded data have no folder
    rows = folders.check(named.name(), named.folder())
    chosen.answer(pd.DataFrame([{**row._asdict(), "ok": row.ok} for row in rows]), dataset)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)
