"""Tables and progress: bars with the time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from flatlab.errors import count_of, printable
from flatlab.jobs.plan import Job
from flatlab.jobs.timeleft import TimeLeft

PER_JOB, START = 0.6, 5.0  # seconds in addition to the passes: loading and writing of a job, and start of the workers
WIDEST = 100_000  # columns without a terminal: each row is one line; a terminal folds long cells


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False)
    folds = console.is_terminal and console.file.isatty()
    return console if folds else Console(stderr=stderr, highlight=False, width=WIDEST)


out = _console(stderr=False)
err = _console(stderr=True)
PLAIN_SECONDS = 5.0  # between two lines without a terminal


def _animated() -> bool:
    """Return whether bars can be drawn: FORCE_COLOR makes a console a terminal for rich, also where it is none."""
    return err.is_terminal and err.file.isatty()


class _Name(TextColumn):
    """The text that is shortened if a terminal is narrow: percentages and times are not."""

    def __init__(self) -> None:
        super().__init__("{task.description}", markup=False, table_column=Column())

    def render(self, task: Task) -> Text:
        """Return the text, as long as its column."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Board:
    """Shows the progress of jobs, weighted by their cost, from the workers' events."""

    def __init__(self, jobs: Sequence[Job], progress: Progress | None, *, workers: int = 1) -> None:
        self.time = TimeLeft(jobs, workers=workers)
        self.progress = progress
        self.bars: dict[str, TaskID] = {}
        self.printed = time.monotonic()
        self.total = progress.add_task(count_of(len(jobs), "job"), total=1.0, left="") if progress else None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event, or a worker's note."""
        if "note" in event:
            err.print(printable(event["note"]), soft_wrap=True, markup=False)
            return
        name = event["job"]
        over = bool(event.get("finished") or event.get("error"))
        ended = over and name not in self.time.seconds  # each worker reports a job that is done
        self.time.on_event(name, event.get("share", 0.0), over=over)
        if self.progress and self.total is not None:
            self._bar(name, event, over)
            self.progress.update(self.total, completed=self.time.done(), description=self._count(), left=self._left())
        elif ended or time.monotonic() - self.printed > PLAIN_SECONDS:
            self.printed = time.monotonic()
            line = f"{self.time.done():4.0%}  {self._left()}  {printable(name)}{_numbers(event)}"
            err.print(line, soft_wrap=True, markup=False)

    def _left(self) -> str:
        left = self.time.left()
        return "starting" if left is None else f"{_clock(left)} left"

    def _count(self) -> str:
        shares = self.time.share.values()
        return f"{sum(share == 1 for share in shares)} of {count_of(len(shares), 'job')}"

    def _bar(self, name: str, event: dict[str, Any], over: bool) -> None:
        assert self.progress
        if over and name in self.bars:
            self.progress.remove_task(self.bars.pop(name))
        elif not over:
            if name not in self.bars:
                self.bars[name] = self.progress.add_task(name, total=1.0, left="")
            self.progress.update(self.bars[name], completed=self.time.share[name], description=name + _numbers(event))


def columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a board."""
    share, left = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[left]}")
    return _Name(), BarColumn(bar_width=12), share, TimeElapsedColumn(), left


@contextmanager
def board(jobs: Sequence[Job], *, workers: int) -> Iterator[Board]:
    """Show the progress of jobs on standard error while the block runs."""
    if not _animated():
        yield Board(jobs, None, workers=workers)
        return
    with Progress(*columns(), console=err) as progress:
        yield Board(jobs, progress, workers=workers)


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a count, from the first report on: a bar, or a line every few seconds."""
    what = printable(what)
    shown = _Name(), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown, console=err, disable=not _animated()) as progress:
        task = progress.add_task(what, total=None, visible=False)
        printed = time.monotonic()

        def report(done: int, of: int) -> None:
            nonlocal printed
            progress.update(task, completed=done, total=of, visible=True)
            if progress.disable and time.monotonic() - printed > PLAIN_SECONDS:
                printed = time.monotonic()
                err.print(f"{what}: {done:,} of {of:,}", soft_wrap=True, markup=False)

        yield report


def frame(table: pd.DataFrame, title: str, *, formats: dict[str, str] | None = None) -> None:
    """Print a frame as a table."""
    drawn = Table(
        title=Text(printable(title)),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    numbers = [pd.api.types.is_numeric_dtype(table[column]) for column in table.columns]
    for column, numeric in zip(table.columns, numbers, strict=True):
        drawn.add_column(Text(printable(str(column))), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False):
        cells = zip(table.columns, row, numbers, strict=True)
        drawn.add_row(*(_cell(v, (formats or {}).get(str(c)), numeric=numeric) for c, v, numeric in cells))
    out.print(drawn)


def plan(jobs: Sequence[Job], costs: Sequence[float], source: str, *, workers: int) -> None:
    """Print jobs, passes and estimated time.

    Args:
        jobs: the missing jobs.
        costs: core seconds of each.
        source: of the costs, for the message.
        workers: number of processes.
    """
    kinds: dict[str, list[tuple[float, float]]] = {}
    for job, cost in zip(jobs, costs, strict=True):
        kinds.setdefault(job.name.partition(" on ")[0], []).append((job.passes, cost))
    rows = [
        {
            "jobs": len(all_),
            "what": kind,
            "image passes": f"{sum(passes for passes, _ in all_):,.0f}",
            "core time": _clock(sum(cost + PER_JOB for _, cost in all_)),
        }
        for kind, all_ in kinds.items()
    ]
    if rows:
        frame(pd.DataFrame(rows), "What is missing")
    out.print(summary(jobs, costs, source, workers=workers), soft_wrap=True)


def summary(jobs: Sequence[Job], costs: Sequence[float], source: str, *, workers: int) -> str:
    """Return a sentence on the number of jobs, their passes and the estimated time, as `plan` takes them."""
    total = sum(job.passes for job in jobs)
    forward = max(sum(costs) / workers, max(costs, default=0.0))
    estimate = forward + (START + PER_JOB * -(-len(jobs) // workers) if jobs else 0.0)
    each = f"{sum(costs) / total * 1e6:,.0f} µs a pass" if total else "nothing to do"
    return (
        f"{count_of(len(jobs), 'job')}, {total:,.0f} image pass{'' if round(total) == 1 else 'es'}, about"
        f" {_clock(estimate)} with {count_of(workers, 'worker')} ({each}: {source})."
    )


def _cell(value: Any, form: str | None, *, numeric: bool) -> Text:
    """Return a cell, empty where a text is missing, with markup in foreign names left uninterpreted."""
    if value is None or (not numeric and isinstance(value, float) and isnan(value)):
        return Text()
    return Text(format(value, form) if form and isinstance(value, float) else printable(str(value)))


def _numbers(event: dict[str, Any]) -> str:
    shown = event.get("shown", {}).items()
    return "".join(f"  {name} {value}" if isinstance(value, str) else f"  {name} {value:.3f}" for name, value in shown)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
