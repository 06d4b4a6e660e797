"""The application `flatlab`, and its command `reproduce`."""

import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flatlab.cli import info, measuring, overview, store, training
from flatlab.cli.choices import Choices, takes
from flatlab.cli.effects import refuse_without_effect
from flatlab.cli.errors import Commands, reported
from flatlab.cli.options import DATASET, RUNNING, TRAINING
from flatlab.cli.run_jobs import carry_out, everything, price, redraw, show_written
from flatlab.errors import UserError


class Root(TyperGroup):
    """The group of all commands, whose help is the overview."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the overview."""
        typer.echo(overview.page(), nl=False)


app = Commands(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _version(*, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from flatlab import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: `flatlab reproduce fig3 --seeds 2 --dry-run`")
@takes(*DATASET, "datasets", *TRAINING, "controls", "leave_out", "rows", *RUNNING, "out")
def reproduce(
    chosen: Choices,
    name: Annotated[
        str,
        typer.Argument(
            help="Figure or table, such as fig3 (`flatlab list`), or all: those marked `in all` in that list."
        ),
    ],
    draw_only: Annotated[
        bool, typer.Option("--draw-only", help="Draw again from the csv, npz and json in --out, without a store.")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also write the small files that the repository keeps to OUT/reference.")
    ] = False,
) -> None:
    """Reproduce a figure or table of the paper: train and measure what is missing, tabulate, draw."""
    from flatlab import figure_files, reproduce
    from flatlab.cli import display

    if draw_only:
        redraw(chosen, name, reference=reference)
        return
    if name == "all" or not reproduce.analysis(name).rows:
        chosen.refuse(["rows"], f"for {name}")
    elif chosen.leave_out is None:
        chosen.refuse(["rows"], "without --leave-out, which names the methods that it has")
    setting, runs, place = chosen.make_setting(), chosen.runs(), chosen.place()
    if name == "all":
        everything(chosen, reference=reference)
        return
    figure = reproduce.analysis(name)
    todo = reproduce.missing(figure, setting, runs, place)
    refuse_without_effect(chosen, figure.plan, name)
    if chosen.dry_run:
        price(chosen, todo, setting)
        return
    carry_out(chosen, todo)
    redo = shlex.join(["flatlab", *sys.argv[1:]])
    done = reproduce.write(figure, setting, runs, out=chosen.out, redo=redo, reference=reference)
    if chosen.json:
        chosen.answer_facts({**done.paths(), "findings": done.findings.to_dict("records")}, "")
        return
    display.frame(figure.summary(done.findings), figure.summary_title)
    title = figure.sheet_title or figure_files.ACCURACIES
    display.frame(done.accuracies, title, formats=dict.fromkeys(done.accuracies.columns, ".3f"))
    for remark in done.remarks:
        display.out.print(remark, soft_wrap=True, markup=False)
    show_written(done.written, unchanged=done.unchanged)


for _module in (training, measuring, info):
    app.add_typer(_module.commands)
app.add_typer(store.runs_commands, name="runs")
app.add_typer(store.jobs_commands, name="jobs")
app.add_typer(store.data_commands, name="data")


def run(words: list[str]) -> int:
    """Run a command and return its exit code.

    Args:
        words: the arguments of `flatlab`.
    """
    try:
        with reported(debug="--debug" in words):
            if sys.platform == "win32":
                raise UserError("The command line must run on Linux or macOS, but this is Windows: run it in WSL.")
            return app(words, prog_name="flatlab", standalone_mode=False) or 0
    except typer.Exit as end:
        return end.exit_code
