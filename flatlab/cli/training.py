"""The commands that make runs: train, ensemble, import, export, replay."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from flatlab.cli import checks, run_jobs
from flatlab.cli.choices import Choices, takes
from flatlab.cli.effects import refuse_idle, refuse_too_long, refuse_without_effect
from flatlab.cli.errors import Commands, say
from flatlab.cli.options import DATASET, MODELS, NAMED, QUANTIZER, RUNNING, STEP, TRAINING, WHERE, Runs, asked
from flatlab.errors import UserError, choose
from flatlab.specs.corruption import under
from flatlab.specs.deploy import OnnxSpec
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.measurements import LatencySpec
from flatlab.specs.methods import PARTS

commands = Commands()

WIDE = tuple(name for name, channels in MODELS.items() if channels == 3)  # of colour images
ACCURACIES = dict.fromkeys(("validation", "test", "target"), ".3f")


@commands.command(
    epilog="Examples: `flatlab train --method qt-dog --held-out rot45`, "
    "`flatlab train --method sam --average swad --quantizer lsq --bits 4 --held-out 0`"
)
@takes(
    *(*DATASET, "method", *PARTS, *TRAINING, *QUANTIZER, *STEP, *RUNNING),
    *("select", "no_target", "keep_every", "tensorboard"),
    seeds=1,
)
def train(chosen: Choices) -> None:
    """Train a method, or any composition of parts, with each domain held out in turn or one of them."""
    from flatlab.data import catalog
    from flatlab.jobs import plan as jobs_plan
    from flatlab.report import tables, valleys
    from flatlab.specs import methods
    from flatlab.store.runs import check_data

    setting, store = chosen.make_setting(), chosen.runs()
    among_all = chosen.select == "all"
    label, parts = methods.method(chosen.method)
    changes = {part: getattr(chosen, part) for part in PARTS if getattr(chosen, part) is not None}
    parts = methods.vary(parts, changes)
    refuse_idle(chosen, parts)
    refuse_without_effect(chosen, partial(methods.replicates, parts), "this method")
    wanted = methods.replicates(parts, setting)
    refuse_too_long(chosen, wanted)
    label += "".join(f", {part} {value}" for part, value in changes.items())
    check_data(map(store.run, wanted), chosen.place())
    todo = jobs_plan.missing(store, wanted, [], sizes=catalog.sizes(setting.dataset, chosen.folder()))
    if chosen.keep_every:
        todo = jobs_plan.keeping(todo, store, wanted, chosen.keep_every)
    if chosen.dry_run:
        run_jobs.price(chosen, todo, setting)
        return
    if chosen.tensorboard:
        from flatlab.report import tensorboard

        tensorboard.needed()  # fails before the training, not after
    run_jobs.carry_out(chosen, todo)
    if chosen.tensorboard:
        run_jobs.show_written([tensorboard.write(store.run(spec), chosen.tensorboard) for spec in wanted])
    table = tables.accuracies(store, [(label, spec) for spec in wanted], among_all=among_all)
    target = f"target{under(setting.corruption)}"
    chosen.answer(
        table, f"Accuracy on source domains (validation, test split) and {target}, by selection rule", ACCURACIES
    )
    for remark in valleys.remarks(map(store.run, wanted)):
        say(remark, mark="")


@commands.command(epilog="Example: `flatlab train --keep-every 10 --held-out rot45`, then `flatlab replay 3f2a`")
@takes(*NAMED, "setting", *WHERE, "device", "cache", "store", "out", "json", "debug")
def replay(
    chosen: Choices,
    runs: Runs,
) -> None:
    """Apply SWA, SMA and SWAD to the checkpoints of `train --keep-every`, and draw SWAD's valley."""
    from flatlab import reproduce
    from flatlab.cli import display
    from flatlab.report import replay as report_replay
    from flatlab.specs import methods, settings
    from flatlab.train.replay import replay as replayed

    found = chosen.found(runs)
    for run in found:
        run.kept_each()
    place, dataset = reproduce.place_of(found, chosen.place())
    suiting = settings.for_data(settings.setting(chosen.setting), dataset)
    done = []
    for run in found:
        rules = methods.averages(suiting.replace(steps=run.spec.steps))
        with display.counter(f"{run.name}: averaging checkpoints") as report:
            done.append(replayed(run, rules, place, report=report))
    table, sentences, written = report_replay.chart(found, done, out=chosen.out)
    shown = table if chosen.json else table[list(report_replay.SHOWN)]
    chosen.answer(shown, f"Averages of kept checkpoints, as in setting {suiting.name}", report_replay.SHOWN)
    run_jobs.show_written(written, sentences)


@commands.command(epilog="Example: `flatlab ensemble 3f2a 77c1 90ab --combine probabilities`")
@takes(*NAMED, "combine", *WHERE, *RUNNING)
def ensemble(
    chosen: Choices,
    runs: Runs,
) -> None:
    """Combine finished runs into an ensemble, which is a run itself (QT-DoG, Eq. 6)."""
    from flatlab import reproduce
    from flatlab.data import catalog
    from flatlab.jobs import plan as jobs_plan
    from flatlab.report import tables
    from flatlab.store.runs import check_data

    store = chosen.runs()
    found = chosen.found(runs)
    members = [run.spec for run in found]
    if len(members) < 2:
        raise UserError("An ensemble must have at least two different runs, got one.")
    combine = chosen.combine or "logits"
    spec = members[0].replace(members=tuple(members), combine=combine)
    place, dataset = reproduce.place_of(found, chosen.place())
    check_data([*found, store.run(spec)], place)
    todo = jobs_plan.missing(
        store, [spec], [], sizes=catalog.sizes(dataset, Path(place.data_dir) if place.data_dir else None)
    )
    if chosen.dry_run:
        run_jobs.price(chosen, todo, spec)
        return
    run_jobs.carry_out(chosen, todo, place)
    table = tables.accuracies(store, [(spec.label, spec)])
    chosen.answer(table[table["selection"] == "last"], f"Run {spec.digest}, averaging {combine}", ACCURACIES)


@commands.command(
    "import",
    epilog="Example: `flatlab import erm.pth --model resnet50 --dataset PACS --data-dir data --held-out sketch`",
)
@takes(*DATASET, "model", "trial_seed", "device", "store", "json", "debug")
def import_(
    chosen: Choices,
    file: Annotated[Path, typer.Argument(help="Checkpoint: .safetensors, or .pth without pickled code.")],
) -> None:
    """Add a checkpoint to the store as a run: one with torchvision's, DomainBed's or SWAD's names, or an export."""
    from flatlab.report import tables
    from flatlab.train.imported import import_checkpoint

    spec = import_checkpoint(file, chosen.make_setting(), chosen.runs(), chosen.place())
    table = tables.accuracies(chosen.runs(), [("imported", spec)])
    chosen.answer(table[table["selection"] == "last"], f"Run {spec.digest}", ACCURACIES)


@commands.command(
    epilog="Examples: `flatlab export 3f2a --file qt-dog.safetensors`, "
    "`flatlab export 3f2a --format onnx --activations int8`, `flatlab export 3f2a 77c1 --format onnx`"
)
@takes(
    *(*NAMED, "combine", *WHERE, "device", "cache", "store", "json", "debug"),
    asks=asked(MeasurementSpec, "checkpoint") | asked(OnnxSpec, *OnnxSpec.model_fields),
)
def export(
    chosen: Choices,
    runs: Runs,
    fields: dict[str, Any],
    file: Annotated[Path | None, typer.Option(help="File to write; DIGEST.safetensors or .onnx if not given.")] = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="Format of the file: packed or onnx; by default that of --file.")
    ] = None,
) -> None:
    """Write a quantized run to a file of integer weights; report its size, or how an ONNX file agrees with it.

    The format is that of the file's suffix, else packed. With --format onnx, several runs become one file, their
    ensemble.
    """
    from flatlab import reproduce
    from flatlab.loading.export import export as write

    kind = checks.file_format(file, kind)
    found, *others = members = chosen.found(runs)
    if not others:
        chosen.refuse(("combine",), "for one run")
    elif kind != "onnx":
        raise UserError("--format packed takes one run; combine them by `flatlab ensemble`, or write --format onnx.")
    path = file or Path(found.spec.digest).with_suffix(checks.SUFFIXES[kind])
    checks.target(path)
    place, _ = reproduce.place_of(members, chosen.place())
    checkpoint = fields.pop("checkpoint")
    if kind == "onnx":
        _export_onnx(chosen, members, path, place, (checkpoint, OnnxSpec(**fields)))
        return
    if changed := [name for name, value in fields.items() if value != OnnxSpec.model_fields[name].default]:
        raise UserError(f"--{changed[0].replace('_', '-')} is of ONNX files; write --format onnx.")
    done = write(found, path, place, checkpoint=checkpoint)
    sentence = (
        f"{done.path}: {done.bytes:,} bytes instead of {done.float_bytes:,}, {done.compression:.2f} times smaller; "
        f"nominally {done.nominal:.2f} times, 32 bits to {done.bits}. {done.quantized_share:.1%} of the parameters are "
        "quantized. flatlab.load_exported reads it."
    )
    chosen.answer_facts(done.facts(), sentence)


def _export_onnx(chosen: Choices, runs: list[Any], path: Path, place: Any, how: tuple[str, OnnxSpec]) -> None:
    import pandas as pd

    from flatlab.deploy import session

    session.needed()
    from flatlab.deploy.onnx import export_onnx

    checkpoint, spec = how
    done = export_onnx(runs, path, place, spec, checkpoint=checkpoint, combine=chosen.combine or "logits")
    rows = pd.DataFrame([asdict(row) for row in done.rows])
    formats = {"agreement": ".2%", "deviation": ".2g", "largest": ".2f", "accuracy": ".3f", "accuracy_onnx": ".3f"}
    chosen.answer(rows, f"{done.path}: {done.bytes:,} bytes, {spec.activations} activations", formats)
    if not chosen.json:
        for remark in done.remarks:
            say(remark, mark="")


@commands.command(
    epilog="Examples: `flatlab latency QT-DoG --held-out rot45`, `flatlab latency net.onnx`, "
    "`flatlab latency --model resnet50 --image-size 224`"
)
@takes(
    *(*NAMED, "model", "image_size", *WHERE, "cache", "store", "json", "debug"),
    asks=asked(LatencySpec, "rounds"),
)
def latency(
    chosen: Choices,
    fields: dict[str, Any],
    given: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN|FILE]...", help="Runs, or ONNX files (.onnx).")
    ] = None,
) -> None:
    """Time networks on this processor: in torch and onnxruntime, in floats, with integer weights and in int8.

    With --model: a network with random weights, of images of --image-size pixels (224), quantized to 7 bits.
    """
    from flatlab import reproduce
    from flatlab.deploy import session

    session.needed()
    from flatlab.deploy.engines import engines
    from flatlab.deploy.latency import timed

    names, named = given or [], None
    if chosen.model:
        named = choose("model", chosen.model, WIDE), chosen.image_size or 224
        chosen.check_side(*named)
    else:
        chosen.refuse(("image_size",), "without --model")
    if not names and not named:
        raise UserError("Nothing to time: name runs, ONNX files, or a network by --model.")
    files = [Path(each) for each in names if each.endswith(".onnx")]
    found = chosen.found([each for each in names if not each.endswith(".onnx")]) if len(files) < len(names) else []
    place = reproduce.place_of(found, chosen.place())[0] if found else chosen.place()
    with engines(found, files, place, named=named) as ready:
        times = timed(ready, **fields)
    rows = times.to_frame().drop(columns="accuracy")
    formats = dict.fromkeys(("median_ms", "low_ms", "high_ms", "peak_mb"), ".2f")
    chosen.answer(
        rows, f"Milliseconds a batch: medians of {fields['rounds']} calls, 95 % intervals; {times.processor}", formats
    )
    if not chosen.json:
        for remark in times.remarks:
            say(remark, mark="")
