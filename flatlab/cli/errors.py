"""From an exception to one sentence and an exit code: a mistake of the user's shows no traceback, a bug says so.

Exit codes: 2 a mistake that the user can mend, 1 a fault of flatlab's own, 130 stopped by the user.
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

# typer brings click's exceptions along, since 0.16 under its own name: they are found by theirs.
USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
ABORTED = 130  # as a shell gives for SIGINT
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
Command = Callable[..., None]


class Strict(TyperCommand):
    """A command that refuses an option given twice and an empty value: the last of two would win in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the words as they were written, then convert them."""
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for param in order:
            hint: dict[str, Any] = {"ctx": ctx, "param": param}
            given = _each(values.get(param.name))
            if len(set(given)) < len(given) or (order.count(param) > 1 and not param.multiple):
                raise typer.BadParameter("it is given twice; give it once.", **hint)
            if any(isinstance(each, str) and not each.strip() for each in given):
                raise typer.BadParameter("it must not be empty.", **hint)
        return super().parse_args(ctx, args)


def _each(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else [value]


class Commands(typer.Typer):
    """A group of such commands."""

    def command(self, name: str | None = None, **more: Any) -> Callable[[Command], Command]:  # type: ignore[override]
        """Return the decorator of a command."""
        return super().command(name, cls=Strict, **more)


@contextmanager
def spoken(*, debug: bool) -> Iterator[None]:
    """Turn an exception into one sentence and an exit code.

    Args:
        debug: let a mistake or a bug through with its traceback.
    """
    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt:
        say("Stopped. What is done is kept: the same command goes on from here.", mark="")
        raise typer.Exit(ABORTED) from None
    except BrokenPipeError:  # `flatlab runs list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except USAGE as error:
        if sentence := of_usage(error):
            say(sentence)
        raise typer.Exit(2 if sentence else 0) from None
    except Exception as error:
        if debug:
            raise
        sentence, code = told(error)
        say(sentence)
        raise typer.Exit(code) from None


def told(error: Exception) -> tuple[str, int]:
    """Return the sentence for an exception, and the exit code."""
    if isinstance(error, UserError):
        if not isinstance(error.__cause__, WorkerError):
            return str(error), 2
        return f"{error} Run it again with --debug to see where.", 1  # a worker's bug, its traceback behind it
    if isinstance(error, OSError):
        return of_system(error), 2
    if isinstance(error, MemoryError):
        return "Out of memory; take a smaller --batch-size or --image-size, or fewer --workers.", 2
    name = type(error).__name__
    return f"{name}: {error}: a bug in flatlab, not a mistake of yours. Run it again with --debug to see where.", 1


def of_system(error: OSError) -> str:
    """Return what the system refused, and what to do about it."""
    what = f"{error.filename or 'the disk'}: {error.strerror or error}"
    if error.errno in FULL:
        return f"{what}; make room, or name another folder with --store or --out. What is finished is kept."
    if error.errno in UNWRITABLE:
        return f"{what}; name a folder that can be written with --store or --out."
    return f"{what}; check the paths given (--store, --out, --data-dir)."


def of_usage(error: Any) -> str:
    """Return the sentence for an unknown word or a value of the wrong kind; none where the help was printed.

    Args:
        error: a `USAGE`.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed by now
        return ""
    near = getattr(error, "possibilities", None)  # of an option, the nearest first
    sentence = f"{error.message.rstrip('.')}. Did you mean {near[0]}?" if near else error.format_message()
    command = error.ctx.command_path if error.ctx else "flatlab"
    return f"{sentence if sentence[-1] in '.?' else f'{sentence}.'} See `{command} --help`."


def say(sentence: str, *, mark: str = "error: ") -> None:
    """Print a sentence on standard error."""
    from rich.console import Console
    from rich.markup import escape

    colour = "red" if mark else "yellow"
    told = "\n".join(map(printable, sentence.split("\n")))
    Console(stderr=True, highlight=False).print(f"[{colour}]{mark}[/]{escape(told)}", soft_wrap=True)
