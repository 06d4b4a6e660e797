"""`flatlab import`, `flatlab export` and `flatlab ensemble`: runs from files, files from runs, runs put together."""

from pathlib import Path
from typing import Annotated

import typer

from flatlab.cli import checks, run_jobs
from flatlab.cli.choices import Choices
from flatlab.cli.options import OneRun, Runs
from flatlab.errors import UserError, choose

ACCURACIES = dict.fromkeys(("validation", "test", "target"), ".3f")


def import_(
    chosen: Choices, file: Annotated[Path, typer.Argument(help=".safetensors, or .pth without pickled code.")]
) -> None:
    """Take a checkpoint trained elsewhere (torchvision's, DomainBed's or SWAD's names), or exported, in as a run."""
    from flatlab.report import tables
    from flatlab.train.imported import import_checkpoint

    spec = import_checkpoint(file, chosen.setting(), chosen.runs(), chosen.place())
    table = tables.accuracies(chosen.runs(), [("imported", spec)])
    chosen.answer(table[table["selection"] == "last"], f"Run {spec.digest}", ACCURACIES)


def export(
    chosen: Choices,
    run: OneRun,
    file: Annotated[Path | None, typer.Option(help="The file to write (DIGEST.safetensors).")] = None,
    checkpoint: Annotated[str, typer.Option(help="selected (by source validation) or last.")] = "selected",
) -> None:
    """Write a quantized run with packed integer weights, and say what that saves in truth."""
    from flatlab import reproduce
    from flatlab.loading.export import export as write

    found = chosen.found([run])[0]
    path = file or Path(f"{found.spec.digest}.safetensors")
    checks.target(path)
    place, _ = reproduce.place_of([found], chosen.place())
    done = write(found, path, place, checkpoint=choose("checkpoint", checkpoint, ("selected", "last")))
    sentence = (
        f"{done.path}: {done.bytes:,} bytes instead of {done.float_bytes:,}, {done.compression:.2f} times smaller; "
        f"nominally {done.nominal:.2f} times, 32 bits to {done.bits}. {done.quantized_share:.1%} of the parameters are "
        "quantized. flatlab.load_exported reads it."
    )
    chosen.answer_facts(done.facts(), sentence)


def ensemble(
    chosen: Choices,
    runs: Runs,
) -> None:
    """Put finished runs together to an ensemble, a run of its own (QT-DoG, Eq. 6)."""
    from flatlab import reproduce
    from flatlab.data import catalog
    from flatlab.jobs import plan as jobs_plan
    from flatlab.report import tables
    from flatlab.specs.methods import KNOWN
    from flatlab.store.runs import check_data

    store = chosen.runs()
    found = chosen.found(runs)
    members = [run.spec for run in found]
    if len(members) < 2:
        raise UserError("An ensemble has two members or more, and they are different runs; name another one.")
    combine = choose("combination", chosen.combine or "logits", KNOWN["combine"])
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
