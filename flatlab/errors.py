"""A user's mistake in one sentence: names with their nearest neighbour, numbers within their range."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend, or several; the command line prints a sentence each and exits with 2."""

    def __str__(self) -> str:
        """Return a line for each sentence: what a foreign name has of control characters is escaped."""
        return "\n".join(printable(str(sentence)) for sentence in self.args)


class WorkerError(Exception):
    """The traceback of a worker's own fault, as the cause of the error that the command line tells."""


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the known name that `name` means, blind to case and to `-` against `_`.

    Args:
        kind: what is being named, for the message ("method", "held-out domain").
        name: what the user wrote.
        known: the names there are.

    Raises:
        UserError: lists the known names and suggests the nearest one.
    """
    names = list(known)
    plain = {_plain(each): each for each in names}
    if _plain(name) in plain:
        return plain[_plain(name)]
    near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
    hint = f"did you mean {plain[near[0]]}? Known" if near else "known"
    raise UserError(f"Unknown {kind} {name!r}; {hint}: {', '.join(names)}.")


def printable(text: str) -> str:
    """Return text with line feeds, escapes and other control characters written out: foreign names may hold some."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")
