"""Labelled sentences from tab-separated files, one for each domain; the embedded ones among them. Torch-free."""

import hashlib
import lzma
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from flatlab.errors import UserError

EMBEDDED = "sentences"
CLASSES = ("negative", "positive")  # of the embedded sentences: mean rating below -0.5, above 0.5; the rest is left out


@dataclass(frozen=True)
class Table:
    """One domain's sentences and the names of their classes.

    Attributes:
        texts: the sentences.
        labels: the class of each.
        groups: who wrote each; empty: not known.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()


@cache
def embedded() -> dict[str, Table]:
    """Return the embedded sentences by domain: those of Hutto and Gilbert (2014), see `resources/sentences.md`."""
    text = lzma.decompress(files("flatlab.resources").joinpath("sentences.tsv.xz").read_bytes()).decode()
    rows = [line.split("\t") for line in text.splitlines()]
    domains = sorted({domain for domain, _, _ in rows})
    of = {name: [(CLASSES[int(label)], words) for domain, label, words in rows if domain == name] for name in domains}
    return {name: _table(pairs) for name, pairs in of.items()}


def read(root: Path) -> dict[str, Table]:
    """Read a folder with one file DOMAIN.tsv for each domain, each line a label, a tab and a sentence.

    Raises:
        UserError: there are fewer than two files, a line is broken, a sentence empty, or a class not in every domain.
    """
    paths = sorted(root.glob("*.tsv")) if root.is_dir() else []
    if len(paths) < 2:
        raise UserError(
            f"Leave-one-domain-out needs at least two domains, and {root} holds {len(paths)}: expected one file"
            " DOMAIN.tsv for each, with lines of a label, a tab and a sentence."
        )
    tables = {path.stem: _table(_rows(path)) for path in paths}
    classes = {name: set(table.labels) for name, table in tables.items()}
    _refuse_unequal(root, classes)
    return tables


def classes_of(tables: Mapping[str, Table]) -> tuple[str, ...]:
    """Return the names of the classes in label order."""
    return tuple(sorted({label for table in tables.values() for label in table.labels}))


def fingerprint(name: str, found: Mapping[str, Table]) -> str:
    """Return the SHA-256 over a data set's name, sentences, labels and groups: two equal ones are the same data."""
    digest = hashlib.sha256(name.encode())
    for domain, table in found.items():
        groups = (table.groups,) * bool(table.groups)
        digest.update(repr((domain, table.texts, table.labels, *groups)).encode())
    return digest.hexdigest()


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text, but byte {error.start} is not: save it as UTF-8.") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if not rows:
        raise UserError(f"{path} has no line: expected lines of a label, a tab and a sentence.")
    return rows


def _row(path: Path, number: int, line: str) -> tuple[str, str]:
    label, *rest = line.split("\t")
    if len(rest) != 1 or not label.strip():
        raise UserError(
            f"Line {number} of {path} must be a label, a tab and a sentence, got {len(rest)} tabs"
            f" in {line[:40]!r}: write LABEL<tab>SENTENCE."
        )
    if not rest[0].strip():
        raise UserError(f"Line {number} of {path} has an empty sentence: write one, or remove the line.")
    return label.strip(), rest[0].strip()


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    labels, texts = zip(*rows, strict=True)
    return Table(texts, labels)


def _refuse_unequal(root: Path, classes: Mapping[str, set[str]]) -> None:
    every = set.union(*classes.values())
    if len(every) < 2:
        raise UserError(f"The sentences of {root} must have at least two classes, got only {', '.join(every)}.")
    for domain, own in classes.items():
        if missing := sorted(every - own):
            others = ", ".join(sorted(own))
            raise UserError(
                f"Label {missing[0]!r} is outside the classes of {root / domain}.tsv ({others}), but other domains have"
                " it: each domain needs each class, so correct the label or add such sentences."
            )
