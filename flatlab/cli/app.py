"""The command line: each command parses, calls one function, and prints; torch is loaded by workers, not here."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from flatlab.cli import checks, measuring, training
from flatlab.cli.choices import Choices, takes
from flatlab.cli.effects import refuse_idle, refuse_without_effect
from flatlab.cli.errors import Commands, say, spoken
from flatlab.cli.measuring import hessian, noise
from flatlab.cli.options import DATA, NAMED, PARTS, QUANTIZER, RUNNING, TRAINING, Runs
from flatlab.cli.run_jobs import carry_out, catalogue, everything, measured, price, redraw, show_written
from flatlab.cli.store import data_app, runs_app
from flatlab.errors import UserError, choose

HELP = """How flat is this minimum, is that one flatter, and does it matter out of domain?

Begin with `flatlab reproduce fig3`: it trains five methods on embedded data, measures how flat their minima are, and
draws Figure 3 of QT-DoG (arXiv 2410.06020) with error bands. Every command can be stopped and called again."""

app = Commands(
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(runs_app, name="runs")
app.add_typer(data_app, name="data")
ACCURACIES = dict.fromkeys(("validation", "test", "target"), ".3f")


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from flatlab import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: `flatlab reproduce fig3 --seeds 2 --dry-run`")
@takes(*DATA, "datasets", *TRAINING, "controls", *RUNNING, "out")
def reproduce(
    chosen: Choices,
    name: Annotated[str, typer.Argument(help="fig3, ... (`flatlab list`), or all.")],
    draw_only: Annotated[
        bool, typer.Option("--draw-only", help="Draw again from the csv, npz and json in --out; no store is needed.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Write the small files that the repository keeps to OUT/reference, too.")
    ] = False,
) -> None:
    """Redo a figure or table of the paper: train and measure what is missing, tabulate, draw."""
    from flatlab import figure_files, reproduce
    from flatlab.cli import display
    from flatlab.files import strict_json

    if draw_only:
        redraw(chosen, name, reference=reference)
        return
    setting, store, place = chosen.setting(), chosen.runs(), chosen.place()
    if name == "all":
        everything(chosen, reference=reference)
        return
    module = reproduce.analysis(name)
    todo = reproduce.missing(module, setting, store, place)
    refuse_without_effect(chosen, module.plan, name)
    if chosen.dry_run:
        price(chosen, todo, setting)
        return
    carry_out(chosen, todo)
    redo = shlex.join(["flatlab", *sys.argv[1:]])
    done = reproduce.write(module, setting, store, out=chosen.out, redo=redo, reference=reference)
    if chosen.json:
        written = [str(path) for path in done.written]
        typer.echo(strict_json({"written": written, "findings": done.findings.to_dict("records")}))
        return
    display.frame(module.summary(done.findings), module.SUMMARY)
    display.frame(done.accuracies, figure_files.ACCURACIES, formats=dict.fromkeys(done.accuracies.columns, ".3f"))
    for remark in done.remarks:
        display.out.print(remark, soft_wrap=True, markup=False)
    show_written(done.written)


@app.command(
    epilog="Examples: `flatlab train --method qt-dog --held-out rot45`, "
    "`flatlab train --method sam --average swad --quantizer lsq --bits 4 --held-out 0`"
)
@takes(
    *DATA,
    "method",
    *PARTS,
    *TRAINING,
    *QUANTIZER,
    *RUNNING,
    "select",
    "no_target",
    "keep_every",
    "tensorboard",
    seeds=1,
)
def train(chosen: Choices) -> None:
    """Train a method, or any composition of parts, with each domain held out in turn or one of them."""
    from flatlab.data import catalog
    from flatlab.jobs import plan as jobs_plan
    from flatlab.report import tables, valleys
    from flatlab.specs import methods
    from flatlab.store.runs import check_data

    setting, store = chosen.setting(), chosen.runs()
    among_all = choose("selection", chosen.select or "settled", ("settled", "all")) == "all"
    if chosen.keep_every and chosen.keep_every > setting.steps:
        raise UserError(f"--keep-every must be at most --steps, got {chosen.keep_every} > {setting.steps}.")
    label, parts = methods.method(chosen.method)
    changes = {part: chosen.given[part] for part in PARTS if chosen.given[part] is not None}
    parts = methods.vary(parts, changes)
    refuse_idle(chosen, parts)
    refuse_without_effect(chosen, partial(methods.replicates, parts), "this method")
    wanted = methods.replicates(parts, setting)
    label += "".join(f", {part} {value}" for part, value in changes.items())
    check_data(map(store.run, wanted), chosen.place())
    todo = jobs_plan.missing(store, wanted, [], sizes=catalog.sizes(setting.dataset, chosen.folder()))
    if chosen.keep_every:
        todo = jobs_plan.keeping(todo, store, wanted, chosen.keep_every)
    if chosen.dry_run:
        price(chosen, todo, setting)
        return
    if chosen.tensorboard:
        from flatlab.report import tensorboard

        tensorboard.needed()  # said before hours of training, not after
    carry_out(chosen, todo)
    if chosen.tensorboard:
        show_written([tensorboard.write(store.run(spec), chosen.tensorboard) for spec in wanted])
    table = tables.accuracies(store, [(label, spec) for spec in wanted], among_all=among_all)
    chosen.answer(
        table, "Accuracy on source domains (validation, test split) and target, by selection rule", ACCURACIES
    )
    for remark in valleys.remarks(map(store.run, wanted)):
        say(remark, mark="")


@app.command(epilog="Example: `flatlab flatness ERM QT-DoG --held-out rot45 --radii 0:3:0.5 --split target`")
@takes(*NAMED, "data_dir", *RUNNING, "out")
def flatness(
    chosen: Choices,
    runs: Runs,
    radii: Annotated[
        str | None,
        typer.Option(
            help="start:stop:step, the end included, a comma-separated list, or auto (each run: F from 0.01 to 2 nats) "
            "(where the first run's loss rises by 0.02 to 1 nat; of the paper's own network 0:60:5)."
        ),
    ] = None,
    rel_error: Annotated[float, typer.Option(help="Standard error / |F| at which sampling stops.")] = 0.02,
    abs_error: Annotated[float, typer.Option(help="Standard error in nats at which it stops anyhow.")] = 1e-4,
    budget: Annotated[int | None, typer.Option(help="Images forwarded at most (100 passes a radius).")] = None,
    block_size: Annotated[int | None, typer.Option(help="Images that a direction sees (a pilot finds out).")] = None,
    samples: Annotated[int | None, typer.Option(help="So many directions on all images, as SWAD's script.")] = None,
    split: Annotated[str, typer.Option(help="source (domains) or target (the held-out domain).")] = "source",
    normalisation: Annotated[
        str, typer.Option(help="none: radii are L2 distances; filter, layer, parameter: shares of the weights' norm.")
    ] = "none",
    space: Annotated[
        str, typer.Option(help="Of quantized runs: baked (the quantized weights, as plain ones), or latent.")
    ] = "baked",
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
    params: Annotated[str | None, typer.Option(help="Only parameters that match, as 'features.0*' (all).")] = None,
    images: Annotated[int | None, typer.Option(help="At most so many images of each domain (all).")] = None,
    direction_seed: Annotated[int, typer.Option(help="Of the directions.")] = 0,
) -> None:  # the options of a measurement are its own, hence so many
    """Measure how fast the loss rises around trained runs: F on spheres (QT-DoG Eq. 5), with intervals."""
    from flatlab import reproduce
    from flatlab.report.panels import TITLES
    from flatlab.report.sphere import SHOWN, chart, measurement_of, panel_of, said

    store, panel = chosen.runs(), panel_of(split)
    if samples is not None:
        chosen.refuse(("rel_error", "abs_error", "budget", "block_size"), "with --samples")
    found = chosen.found(runs)
    reproduce.place_of(found, chosen.place())
    fields: dict[str, Any] = {"space": space, "checkpoint": checkpoint, "params": params, "images": images}
    fields |= {"rel_error": rel_error, "abs_error": abs_error, "budget": budget, "block_size": block_size}
    fields |= {"seed": direction_seed, "num_samples": samples, "normalisation": normalisation}
    measurement = measurement_of(radii, found[0].spec, **fields)
    checks.space(found, measurement.space)
    if not measured(chosen, found, [measurement]):
        return
    table, written = chart(store, found, measurement, panel=panel, out=chosen.out)
    shown = table if chosen.json else table[list(SHOWN)]
    chosen.answer(shown, f"Flatness, {TITLES[panel]} (nats), 95 % intervals over directions", SHOWN)
    show_written(written, said(found, measurement, panel=panel))


app.command(epilog="Examples: `flatlab noise 3f2a`, `flatlab noise 3f2a 77c1 --radius --samples 50`")(
    takes(*NAMED, "data_dir", *RUNNING, "out")(noise)
)
app.command(epilog="Example: `flatlab hessian 3f2a --split source --split target -k 5 --images 200`")(
    takes(*NAMED, "data_dir", *RUNNING, "out")(hessian)
)
app.command(
    epilog="Examples: `flatlab landscape 3f2a --grid 25 --images 200`, `flatlab landscape 3f2a 77c1 --axes line`"
)(takes(*NAMED, "data_dir", *RUNNING, "out")(measuring.landscape))
app.command(epilog="Example: `flatlab audit 3f2a --images 200`")(
    takes(*NAMED, "data_dir", *RUNNING, "out")(measuring.audit)
)
app.command(epilog="Example: `flatlab train --keep-every 10 --held-out rot45`, then `flatlab replay 3f2a`")(
    takes(*NAMED, "setting", "data_dir", "device", "cache", "store", "out", "json", "debug")(measuring.replay)
)
app.command(epilog="Example: `flatlab selftest`")(takes("json", "debug")(measuring.selftest))


@app.command(epilog="Example: `flatlab stability 3f2a 77c1 --since 120`")
@takes(*NAMED, "store", "out", "json", "debug")
def stability(
    chosen: Choices,
    runs: Runs,
    valley: Annotated[
        bool, typer.Option("--valley", help="Replay SWAD's rule on the logs, and draw its valley.")
    ] = False,
    since: Annotated[
        int | None, typer.Option(help="The first step that counts (the latest switch of the runs).")
    ] = None,
) -> None:
    """Say how steady accuracy on the held-out domain is, whether validation follows it, and what selecting costs."""
    from flatlab.report.stability import SHOWN, chart, switch_of
    from flatlab.report.valleys import sentence

    if valley:
        from flatlab.train.replay import valley as valley_of

    store, found = chosen.runs(), chosen.found(runs)
    first = switch_of([run.spec for run in found]) if since is None else since
    valleys = [valley_of(run) for run in found] if valley else ()
    table, written = chart(store, found, since=first, out=chosen.out, valleys=valleys)
    chosen.answer(table, f"Stability of the accuracy on the held-out domain from step {first} on (percent)", SHOWN)
    show_written(written, [f"{run.name}: {sentence(each)}" for run, each in zip(found, valleys, strict=False)])


app.command(
    "import",
    epilog="Example: `flatlab import erm.pth --model resnet50 --dataset PACS --data-dir data --held-out sketch`",
)(takes(*DATA, "model", "trial_seed", "device", "store", "json", "debug")(training.import_))
app.command(epilog="Example: `flatlab export 3f2a --file qt-dog.safetensors`")(
    takes(*NAMED, "data_dir", "device", "cache", "store", "json", "debug")(training.export)
)
app.command(epilog="Example: `flatlab ensemble 3f2a 77c1 90ab --combine probabilities`")(
    takes(*NAMED, "combine", "data_dir", *RUNNING)(training.ensemble)
)


@app.command(epilog="Example: `flatlab methods --json`")
@takes("json", "debug")
def methods(chosen: Choices) -> None:
    """List the methods and what they are composed of."""
    import pandas as pd

    from flatlab.specs.methods import METHODS

    rows = [{"method": name, **dataclasses.asdict(parts)} for name, parts in METHODS.items()]
    chosen.answer(
        pd.DataFrame(rows), "Methods; any other composition: --objective --mixing --step --average --quantizer"
    )


@app.command("list", epilog="Example: `flatlab list --setting smoke`")
@takes(*DATA, *TRAINING, "store", "device", "json", "debug")
def list_(chosen: Choices) -> None:
    """List the figures and tables that can be reproduced, and what is missing to make them."""
    catalogue(chosen)


@app.command(epilog="Example: `flatlab doctor --device cuda`")
@takes("device", "json", "debug")
def doctor(chosen: Choices) -> None:
    """Say what this machine computes with, and what would make it faster."""
    from flatlab.cli.info import diagnose

    facts = diagnose(chosen.place())
    chosen.answer_facts(facts, "\n".join(f"{name}: {value}" for name, value in facts.items()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code.

    Args:
        arguments: instead of the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(words))


def _run(words: list[str]) -> int:
    try:
        with spoken(debug="--debug" in words):
            return app(words, prog_name="flatlab", standalone_mode=False) or 0
    except typer.Exit as end:
        return end.exit_code


if __name__ == "__main__":
    main()
