"""From an exception to one sentence and an exit code: a mistake of the user's shows no traceback, a bug says so.

Exit codes: 2 a mistake that the user can mend, 1 a fault of flatlab's own, 130 stopped by the user.
"""

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from flatlab.errors import UserError, WorkerError, choose, printable

# typer brings click's exceptions along, since 0.16 under its own name: they are found by theirs.
USAGE: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
ABORTED = 130  # as a shell gives for SIGINT
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
KINDS = {"integer": "a whole number", "number": "a number", "float": "a number"}


@contextmanager
def spoken(*, debug: bool, arguments: Sequence[str] = ()) -> Iterator[None]:
    """Turn an exception into one sentence and an exit code.

    Args:
        debug: let a mistake or a bug through with its traceback.
        arguments: what the user wrote, for mistakes in the words themselves.
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
        if sentence := of_usage(error, arguments):
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


def of_usage(error: Any, arguments: Sequence[str]) -> str:
    """Return our sentence for an unknown word or a value of the wrong kind; none where the help was printed.

    Args:
        error: a `USAGE`.
        arguments: what the user wrote.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed by now
        return ""
    context, kind, message = getattr(error, "ctx", None), type(error).__name__, error.format_message()
    command = f"`{context.command_path} --help`" if context else "`flatlab --help`"
    if kind == "NoSuchOption" and context:
        options = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
        return _unknown("option", error.option_name, [name for name in options if name.startswith("--")])
    if message.startswith("No such command") and context:
        return _unknown("command", message.split("'")[1], list(context.command.commands))
    if kind == "MissingParameter" and error.param is not None:
        return (
            f"{error.param.name.upper()} is missing: {error.param.help or 'see the help'} {command} shows an example."
        )
    if kind == "BadParameter" and error.param is not None:
        return _wrong_kind(error, message, arguments)
    return f"{message.rstrip('.')}; {command} shows what it takes."


def _unknown(kind: str, name: str, known: list[str]) -> str:
    try:
        choose(kind, name, known)
    except UserError as error:
        return str(error)
    return f"{kind.capitalize()} {name!r} must be written as in the help."  # only by case or `-` against `_`


def _wrong_kind(error: Any, message: str, arguments: Sequence[str]) -> str:
    option = next((name for name in error.param.opts if name.startswith("--")), error.param.name)
    came = next((value for name, value in _given(arguments) if name == option), None)
    expected = next((words for word, words in KINDS.items() if word in message), None)
    if came is None or expected is None:
        return message
    return f"{option} {came} does not do: {expected} is expected."


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each option with its value, written `--steps 5` or `--steps=5`."""
    for name, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = name.partition("=")
        yield option, value if equals else following


def say(sentence: str, *, mark: str = "error: ") -> None:
    """Print a sentence on standard error."""
    from rich.console import Console
    from rich.markup import escape

    colour = "red" if mark else "yellow"
    told = "\n".join(map(printable, sentence.split("\n")))
    Console(stderr=True, highlight=False).print(f"[{colour}]{mark}[/]{escape(told)}", soft_wrap=True)
