"""Errors of users, each reported in one sentence; an unknown name is reported with the nearest known one."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """One or more mistakes that the user can correct; the command line prints a sentence for each and exits with 2."""

    def __str__(self) -> str:
        """Return a line for each sentence, with control characters (of foreign names) escaped."""
        return "\n".join(printable(str(sentence)) for sentence in self.args)


class WorkerError(Exception):
    """The traceback of an internal error of a worker, as the cause of the error that the command line reports."""


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the known name that matches `name`, ignoring case and the difference between `-` and `_`.

    Args:
        kind: of the name, for the message ("method", "held-out domain").
        name: as the user wrote it.
        known: the valid names.

    Raises:
        UserError: if no known name matches; lists them and suggests the nearest.
    """
    names = list(known)
    plain = {_plain(each): each for each in names}
    if _plain(name) in plain:
        return plain[_plain(name)]
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[near[0]]}? Known" if near else "known"
    raise UserError(f"Unknown {kind} {name!r}; {hint}: {', '.join(names)}.")


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 run", "1,200 runs"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def printable(text: str) -> str:
    """Return text with line feeds, escapes and other control characters escaped: foreign names may contain them."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def reason(error: BaseException) -> str:
    """Return the first line of an error of another package, or the error's class if it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
