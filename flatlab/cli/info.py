"""The commands that inform: methods, list, doctor, report, selftest."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from flatlab.cli.choices import Choices, takes
from flatlab.cli.errors import Commands
from flatlab.cli.options import DATASET, NAMED, TRAINING
from flatlab.specs.run import Place

commands = Commands()


@commands.command(epilog="Example: `flatlab methods --json`")
@takes("json", "debug")
def methods(chosen: Choices) -> None:
    """List the methods and their parts."""
    import pandas as pd

    from flatlab.specs.methods import METHODS

    rows = [{"method": name, **dataclasses.asdict(parts)} for name, parts in METHODS.items()]
    chosen.answer(pd.DataFrame(rows), "Methods; `flatlab train` also accepts any other composition of these parts")


@commands.command("list", epilog="Example: `flatlab list --setting smoke`")
@takes(*DATASET, *TRAINING, "store", "device", "json", "debug")
def list_(chosen: Choices) -> None:
    """List the figures and tables that can be reproduced, with the work that each still needs."""
    import pandas as pd

    from flatlab import figure_files, reproduce

    setting, store, place = chosen.make_setting(), chosen.runs(), chosen.place()
    rows = []
    for name in sorted(reproduce.analyses(), key=figure_files.in_order):
        figure = reproduce.analysis(name)
        lacks = _lacks(reproduce.missing(figure, setting, store, place))
        rows.append({"name": name, "in all": "no" if figure.alone else "yes", "shows": figure.title, "missing": lacks})
    title = f"Figures and tables, setting {setting.name}; `flatlab reproduce all` makes those of `in all`"
    chosen.answer(pd.DataFrame(rows), title)


def _lacks(todo: Sequence[Any]) -> str:
    """Return the numbers of jobs to train, to combine and to measure."""
    measured = sum(bool(job.measurements) for job in todo)
    joined = sum(not job.measurements and bool(job.runs[0].members) for job in todo)
    counts = {"to train": len(todo) - measured - joined, "to combine": joined, "to measure": measured}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"


@commands.command(epilog="Example: `flatlab doctor --device cuda`")
@takes("device", "json", "debug")
def doctor(chosen: Choices) -> None:
    """Report the hardware and software that affect speed and results, and how to make runs faster."""
    facts = _diagnose(chosen.place())
    chosen.answer_facts(facts, "\n".join(f"{name}: {value}" for name, value in facts.items()))


def _diagnose(place: Place) -> dict[str, str]:
    """Return the facts that affect speed or correctness, by name."""
    import torch

    from flatlab import environment
    from flatlab.jobs import local
    from flatlab.loading import data as loading_data

    named = loading_data.device(place)
    facts = {**environment.facts(), "cores": f"{environment.cores()} (one worker each, of one thread)"}
    facts["device"] = f"{named}" + (f", {torch.cuda.get_device_name(named)}" if named.type == "cuda" else "")
    facts["tensorboard"] = (
        "installed" if find_spec("tensorboard") else "not installed (pip install 'flatlab[tensorboard]')"
    )
    unset = [name for name in local.ALLOCATOR if name not in os.environ]
    if unset:
        words = " ".join(f"{name}={local.ALLOCATOR[name]}" for name in unset)
        facts["allocator"] = (
            "flatlab's workers keep large blocks of memory, which glibc would return to the system at each free; "
            f"in your own scripts `export {words}` gives up to 2.6 times the speed for large batches on a CPU."
        )
    return facts


@commands.command(epilog="Example: `flatlab report 3f2a 77c1 surface.npz --out report`")
@takes(*NAMED, "store", "out", "json", "debug")
def report(
    chosen: Choices,
    runs: Annotated[
        list[str],
        typer.Argument(help="Runs, as `flatlab flatness` takes them, and files written by `result.save(FILE.npz)`."),
    ],
) -> None:
    """Write one HTML page, without network: what was measured, in sentences, tables and pictures to rotate."""
    from flatlab.report.html.sections import report as write
    from flatlab.saving import load

    paths = [Path(word) for word in runs if word.endswith(".npz")]
    stems = [path.stem for path in paths]
    saved = {path.stem if stems.count(path.stem) == 1 else str(path): load(path) for path in paths}
    found = chosen.found([word for word in runs if not word.endswith(".npz")])
    redo = shlex.join(["flatlab", *sys.argv[1:]])
    path = write(chosen.runs(), found, saved, out=chosen.out, redo=redo)
    chosen.answer_facts({"written": [str(path)]}, f"Written: {path}")


@commands.command(epilog="Example: `flatlab selftest`")
@takes("json", "debug")
def selftest(chosen: Choices) -> None:
    """Check each estimator against closed forms, on each device and dtype of this machine; exit with 1 if one fails."""
    from flatlab.metrics.selftest import Fault
    from flatlab.metrics.selftest import selftest as checks

    made, failed = [], 0
    for check in checks():
        made.append({**vars(check), "passed": check.passed})
        failed += not check.passed
        if not chosen.json:
            mark = "ok " if check.passed else "BAD"
            numbers = f"expected {check.expected:.6g}, got {check.got:.6g}, within {check.bound:.2g}"
            typer.echo(f"{mark} {check.name}: {check.reason if isinstance(check, Fault) else numbers}")
    sentence = f"{failed} of {len(made)} checks failed." if failed else f"All {len(made)} checks passed."
    chosen.answer_facts(made, sentence)
    if failed:
        raise typer.Exit(1)
