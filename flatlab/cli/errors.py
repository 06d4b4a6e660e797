"""From an exception to one sentence and an exit code; there is no traceback for a user's mistake.

Exit codes: 2 user's mistake, 1 internal error, 130 interrupted.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from flatlab.errors import UserError, WorkerError, printable

USAGE: type[Exception] = typer.BadParameter.__bases__[0]  # click's UsageError, or that of typer's own copy of click
ABORTED = 130  # as a shell gives for SIGINT
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Command = Callable[..., None]


class Strict(TyperCommand):
    """A command that refuses repeated options (click silently uses the last) and empty values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the arguments, then convert them."""
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            hint: dict[str, Any] = {"ctx": ctx, "param": param}
            given = _each(values.get(param.name))
            if len(set(given)) < len(given) or (order.count(param) > 1 and not param.multiple):
                raise typer.BadParameter("must not be given twice.", **hint)
            if any(isinstance(each, str) and not each.strip() for each in given):
                raise typer.BadParameter("must not be empty.", **hint)
        return super().parse_args(ctx, args)


def _each(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else [value]


class Commands(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, **more: Any) -> Callable[[Command], Command]:  # type: ignore[override]
        """Return the decorator of a command."""
        return super().command(name, cls=Strict, **more)


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Convert an exception to one sentence and an exit code.

    Args:
        debug: raise the exception, with its traceback.
    """
    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt:
        say("Stopped. Finished work is kept: repeat the command to continue.", mark="")
        raise typer.Exit(ABORTED) from None
    except BrokenPipeError:  # the reader has closed the pipe, as in `flatlab runs list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except USAGE as error:
        if sentence := of_usage(error):
            say(sentence)
        raise typer.Exit(2 if sentence else 0) from None
    except Exception as error:
        if debug:
            raise
        sentence, code = explain(error)
        say(sentence)
        raise typer.Exit(code) from None


def explain(error: Exception) -> tuple[str, int]:
    """Return the sentence for an exception, and the exit code."""
    if isinstance(error, UserError):
        if not isinstance(error.__cause__, WorkerError):
            return str(error), 2
        return f"{error} Run the command again with --debug to see the traceback.", 1  # a bug in a worker
    if isinstance(error, OSError):
        return of_system(error), 2
    if isinstance(error, MemoryError):
        return "Out of memory; use a smaller --batch-size or --image-size, or fewer --workers.", 2
    name = type(error).__name__
    return f"{name}: {error}: a bug in flatlab. Run the command again with --debug to see the traceback.", 1


def of_system(error: OSError) -> str:
    """Return the system's error and a remedy."""
    what = f"{error.filename or 'the disk'}: {error.strerror or error}"
    if error.errno in FULL:
        return f"{what}; free some space, or choose another folder with --store or --out. Finished work is kept."
    if error.errno in UNWRITABLE:
        return f"{what}; choose a writable folder with --store or --out."
    return f"{what}; check the paths given (--store, --out, --data-dir)."


def of_usage(error: Any) -> str:
    """Return the sentence for a usage error; empty if the help was printed.

    Args:
        error: a `USAGE`.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed by now
        return ""
    near = getattr(error, "possibilities", None)  # nearest first
    sentence = f"{error.message.rstrip('.')}. Did you mean {near[0]}?" if near else error.format_message()
    command = error.ctx.command_path if error.ctx else "flatlab"
    return f"{sentence if sentence[-1] in '.?' else f'{sentence}.'} See `{command} --help`."


def say(sentence: str, *, mark: str = "error: ") -> None:
    """Print a sentence on standard error."""
    from rich.console import Console
    from rich.markup import escape

    colour = "red" if mark else "yellow"
    text = "\n".join(map(printable, sentence.split("\n")))
    Console(stderr=True, highlight=False).print(f"[{colour}]{mark}[/]{escape(text)}", soft_wrap=True)
