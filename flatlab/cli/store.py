"""The commands of stores, clusters and data sets.

runs list, show, verify, rm, merge; jobs list, logs, cancel; data list, check, cache.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flatlab.cli.choices import Choices, takes
from flatlab.cli.errors import Commands, say
from flatlab.cli.options import NAMED, OneRun, Runs
from flatlab.cli.parse import HEX
from flatlab.errors import UserError, count_of, printable

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT]B)")

runs_commands = Commands(help="List, show, verify, remove and merge the runs of a store.", no_args_is_help=True)
jobs_commands = Commands(help="List and cancel Slurm arrays, and show their errors.", no_args_is_help=True)
data_commands = Commands(help="List and check data sets.", no_args_is_help=True)


@runs_commands.command("list", epilog="Example: `flatlab runs list --store runs`")
@takes("store", "json", "debug")
def list_runs(chosen: Choices) -> None:
    """List the runs of a store; exit with 1 if one is damaged."""
    from flatlab.report import tables

    store = chosen.runs()
    if not store.folders() and not chosen.json:
        typer.echo(f"No runs in {store.root}; create some with `flatlab train`, or choose another folder with --store.")
        return
    table, faults = tables.overview(store)
    chosen.answer(table, f"Runs in {store.root}", dict.fromkeys(("validation", "test", "target"), ".3f"))
    for fault in faults:
        say(fault)
    if faults:
        raise typer.Exit(1)


@runs_commands.command(epilog="Example: `flatlab runs show 3f2a`")
@takes(*NAMED, "store", "json", "debug")
def show(chosen: Choices, run: OneRun) -> None:
    """Print a run's spec, provenance and log, always as JSON."""
    from flatlab.files import strict_json
    from flatlab.report import valleys

    (found,) = chosen.named([run])
    shown = {"spec": found.spec.model_dump(mode="json"), "done": found.done, "provenance": found.provenance}
    shown["kept"] = list(found.kept())
    shown["remarks"] = valleys.remarks([found])
    shown["measurements"] = {
        measurement.path.name: measurement.spec.model_dump(mode="json") for measurement in found.measurements()
    }
    typer.echo(strict_json({**shown, "log": found.rows()}, indent=1))


@runs_commands.command(epilog="Example: `flatlab runs verify --store runs`")
@takes("store", "json", "debug")
def verify(
    chosen: Choices,
    clean: Annotated[bool, typer.Option("--clean", help="Remove leftovers of killed processes.")] = False,
) -> None:
    """Compare every file with its recorded hash and owner; exit with 1 if one is damaged or missing."""
    from flatlab.store import leftovers

    store = chosen.runs()
    faults, count = store.faults(), len(store.folders())
    left = leftovers.clean(store) if clean else list(leftovers.leftovers(store))
    sentences = [*faults, f"{count_of(count, 'run')} in {store.root}, {count_of(len(faults), 'fault')}."]
    if clean:
        sentences.append(f"{count_of(len(left), 'leftover')} of killed processes removed.")
    elif left:
        them = "it" if len(left) == 1 else "them"
        number = count_of(len(left), "leftover")
        sentences.append(f"{number} of killed processes; `flatlab runs verify --clean` removes {them}.")
    facts = {"runs": count, "faults": faults, "removed" if clean else "leftovers": list(map(str, left))}
    chosen.answer_facts(facts, "\n".join(map(printable, sentences)))
    if faults:
        raise typer.Exit(1)


@runs_commands.command(epilog="Example: `flatlab runs rm 3f2a 77c1`")
@takes(*NAMED, "store", "json", "debug")
def rm(chosen: Choices, runs: Runs) -> None:
    """Delete runs with their measurements."""
    store = chosen.runs()
    named = [store.folder(word) if set(word) <= HEX else chosen.named([word])[0].path for word in runs]
    found = list(dict.fromkeys(named))
    for folder in found:
        store.remove(folder)
    removed = list(map(str, found))
    chosen.answer_facts({"removed": removed}, f"Removed {', '.join(removed)}.")


@runs_commands.command("merge", epilog="Example: `flatlab runs merge --from /elsewhere/runs`")
@takes("store", "json", "debug")
def merge_(
    chosen: Choices,
    other: Annotated[Path, typer.Option("--from", help="Folder of the other store, on any mounted disk; only read.")],
) -> None:
    """Copy the finished runs and measurements of another store into this one; exit with 1 if some are left out."""
    from flatlab.store.merging import merge
    from flatlab.store.runs import RunStore

    if other.resolve() == chosen.runs().root.resolve():
        raise UserError(f"--from must be another store than --store, got {other} for both.")
    counts, refused = merge(RunStore(other), chosen.runs())
    sentence = ", ".join(
        count_of(count, what.removesuffix("s")) if what.endswith("s") else f"{count:,} {what}"
        for what, count in counts.items()
    )
    sentence += "."
    chosen.answer_facts({**counts, "not merged": refused}, sentence)
    for each in refused:
        say(each)
    if refused:
        raise typer.Exit(1)


Number = Annotated[str, typer.Argument(help="Slurm's identifier of the array (`flatlab jobs list`).")]


@jobs_commands.command("list", epilog="Example: `flatlab jobs list --store runs`")
@takes("store", "json", "debug")
def list_jobs(chosen: Choices) -> None:
    """List the Slurm arrays of a store, and the states of their workers."""
    import pandas as pd

    from flatlab.jobs import slurm

    store, rows = chosen.runs(), []
    for each in slurm.arrays(store):
        jobs, number = each.plan.jobs, each.facts["id"]
        done = sum(job.done(store) for job in jobs)
        rows.append({"array": number, "workers": slurm.states(number), "jobs": len(jobs), "done": done})
    chosen.answer(pd.DataFrame(rows, columns=["array", "workers", "jobs", "done"]), f"Slurm arrays of {store.root}")


@jobs_commands.command(epilog="Example: `flatlab jobs logs 1234`")
@takes("store", "json", "debug")
def logs(chosen: Choices, array: Number) -> None:
    """Print the errors of an array's workers, and the files with their output."""
    from flatlab.jobs import slurm

    found = slurm.array(chosen.runs(), array)
    errors = [event for event in found.news() if "error" in event]
    written = sorted(str(path) for path in (found.folder / "logs").iterdir() if path.suffix in (".out", ".err"))
    sentences = [*(f"{event['job']}: {event['error']}" for event in errors), *written]
    chosen.answer_facts({"errors": errors, "files": written}, "\n".join(map(printable, sentences)))


@jobs_commands.command(epilog="Example: `flatlab jobs cancel 1234`")
@takes("store", "json", "debug")
def cancel(chosen: Choices, array: Number) -> None:
    """Cancel an array; its workers save their trainings and end."""
    from flatlab.jobs import slurm

    slurm.array(chosen.runs(), array)
    slurm.cancel(array)
    chosen.answer_facts({"cancelled": array}, f"Slurm array {array} is cancelled; the same command submits another.")


@data_commands.command("list", epilog="Example: `flatlab data list`")
@takes("json", "debug")
def list_data(chosen: Choices) -> None:
    """List the data sets known by name."""
    import pandas as pd

    from flatlab.data.catalog import CATALOG

    rows = [{"name": name, "domains": ", ".join(facts.domains)} for name, facts in CATALOG.items()]
    chosen.answer(
        pd.DataFrame(rows),
        "Data sets; any other in the same layout: --dataset folder:PATH, or folder-text:PATH for sentences",
    )


@data_commands.command(epilog="Example: `flatlab data check PACS --data-dir /data`")
@takes("data_dir", "json", "debug")
def check(
    chosen: Choices, dataset: Annotated[str, typer.Argument(help="PACS, ..., folder:PATH or folder-text:PATH.")]
) -> None:
    """Read every image or sentence of a data set and compare the counts with known ones; exit with 1 if that fails."""
    import pandas as pd

    from flatlab.cli import display
    from flatlab.data import catalog, folders

    named = replace(chosen, dataset=dataset)
    if chosen.data_dir:
        catalog.place(named.name(), chosen.data_dir)  # embedded data have no folder
    with display.counter("reading images") as report:
        rows = folders.check(named.name(), named.folder(), report=report)
    table = pd.DataFrame([{**row._asdict(), "ok": row.ok} for row in rows])
    chosen.answer(table if chosen.json else table.drop(columns="unreadable"), dataset)
    if not chosen.json:
        typer.echo("".join(f"{sentence}\n" for row in rows for sentence in row.unreadable), nl=False)
    if not all(row.ok for row in rows):
        raise typer.Exit(1)


@data_commands.command("cache", epilog="Example: `flatlab data cache --keep 20GB`")
@takes("cache", "json", "debug")
def cache_(
    chosen: Choices,
    keep: Annotated[str, typer.Option(help="Total size of the entries kept, such as 20GB; the last used are kept.")],
) -> None:
    """Delete the least recently used decoded images; those used within a day are kept."""
    from flatlab.data import cache

    size = SIZE.fullmatch(keep.strip().upper())
    if size is None:
        raise UserError(f"--keep must be a number with MB, GB or TB, such as 20GB, got {keep}.")
    removed = cache.evict(chosen.cache or cache.default_folder(), int(float(size[1]) * UNITS[size[2]]))
    names = [str(path) for path in removed]
    chosen.answer_facts({"removed": names}, f"{len(names)} entries removed{': ' if names else ''}{', '.join(names)}.")
