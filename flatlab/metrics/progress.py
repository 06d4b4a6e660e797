"""A progress bar on standard error during calls of the library: after two seconds, in a terminal or a notebook."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from flatlab.derivatives.operators import Curvature, Hessian
from flatlab.metrics.flatness.sampler import counts
from flatlab.metrics.receiving import of_landscapes
from flatlab.seeds import undisturbed

SECONDS = 2.0  # before a bar appears
NOTE = """

    `progress`: a bar on standard error after two seconds; by default in a terminal or notebook.
"""
Count = Callable[[int, int | None], None]
Arguments = dict[str, Any]


@contextmanager
def bar(name: str, progress: bool | None = None) -> Iterator[Count | None]:
    """Show a progress bar while the block runs; yields the function to be called with the counts, or None.

    Args:
        name: of the call.
        progress: whether to show it; None: in a terminal or a notebook.
    """
    with undisturbed():  # rich draws a number when it is imported
        from rich import progress as rich  # here: it takes as long to load as the rest of the library
        from rich.console import Console

    console = Console(stderr=True)
    terminal = console.is_terminal and console.file.isatty()  # FORCE_COLOR alone makes it one for rich
    notebook = console.is_jupyter and find_spec("ipywidgets") is not None  # without it rich warns, and draws nothing
    if not (terminal or notebook if progress is None else progress):
        yield None
        return
    text = rich.TextColumn
    columns = (text("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), text("{task.fields[rate]}"))
    shown = rich.Progress(*columns, rich.TimeElapsedColumn(), text("left"), rich.TimeRemainingColumn(), console=console)
    task = shown.add_task(name, total=None, rate="")
    timer = threading.Timer(SECONDS, shown.start)
    timer.daemon = True

    def count(done: int, of: int | None) -> None:
        pace = shown.tasks[task].speed
        shown.update(task, completed=done, total=of, rate=f"{pace:.3g}/s" if pace else "")

    timer.start()
    try:
        yield count
    finally:
        timer.cancel()
        timer.join()
        if shown.live.is_started:
            shown.stop()


def counted(call: Callable[..., Any], *, products: Callable[[Arguments], int] | None = None) -> Callable[..., Any]:
    """Give a function a progress bar: of its reports, of its products with a matrix, or only of the time.

    Args:
        call: the function; what is no landscape is refused first.
        products: from its arguments to the foreseen number of products with the curvature of its `landscape`.
    """
    signature, call = inspect.signature(call), of_landscapes(call)

    @functools.wraps(call)
    def run(*given: Any, progress: bool | None = None, **named: Any) -> Any:
        with bar(call.__name__, progress) as count:
            if count is None:
                return call(*given, **named)
            arguments = signature.bind(*given, **named).arguments
            if "report" in signature.parameters:
                arguments["report"] = _both(count, arguments.get("report"))
            if products is None:
                return call(**arguments)
            landscape = arguments["landscape"]
            operator = landscape if isinstance(landscape, Curvature) else Hessian(landscape)
            with _watched(operator, count, products(arguments)):
                return call(**{**arguments, "landscape": operator})

    only = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None")
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), only])  # type: ignore[attr-defined]
    run.__doc__ = (call.__doc__ or "").rstrip() + NOTE
    return run


def _both(count: Count, theirs: Callable[..., None] | None) -> Callable[..., None]:
    """Return a function that updates the bar and calls the caller's own report."""

    def report(*progress: Any) -> None:
        count(*(counts(*progress) if len(progress) == 1 else progress))
        if theirs:
            theirs(*progress)

    return report


@contextmanager
def _watched(operator: Curvature, count: Count, foreseen: int) -> Iterator[None]:
    """Update the bar with an operator's products while the block runs."""
    before, theirs = operator.products, operator.watch

    def watch(made: int) -> None:
        count(made - before, max(made - before, foreseen))
        if theirs:
            theirs(made)

    operator.watch = watch
    try:
        yield
    finally:
        operator.watch = theirs
