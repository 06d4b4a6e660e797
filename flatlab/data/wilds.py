"""WILDS' folders as distributed, in their named splits (Koh et al. 2021, arXiv 2012.07421). Torch-free.

Amazon: `reviews.csv` and, row by row, `splits/user.csv`; groups are reviewers. Camelyon17: `metadata.csv` and the
patches it names; groups are hospitals, of which 1 is the split "val" and 2 is "test". Columns, numbers of splits and
names of patches are those of WILDS' code (wilds/datasets, version 2).
"""

import csv
from collections.abc import Iterator
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from flatlab.data.text.tables import Table
from flatlab.data.trees import Tree, files_of
from flatlab.errors import UserError

REVIEWS, USERS, METADATA, PATCHES = "reviews.csv", "splits/user.csv", "metadata.csv", "patches"
SPLITS = {"0": "train", "1": "val", "2": "id_val", "3": "test", "4": "id_test"}  # of Amazon; "-1": not in the data set
STARS = ("1", "2", "3", "4", "5")
WRITTEN = {**{each: each for each in STARS}, **{f"{each}.0": each for each in STARS}}
OWN, WHOLE = {"0": "train", "1": "id_val"}, {"1": "val", "2": "test"}  # of Camelyon17: rows, and whole hospitals
HOSPITALS = ("0", "1", "2", "3", "4")
KINDS = {"0": "normal", "1": "tumor"}
PLACE = ("patient", "node", "x_coord", "y_coord")  # of a patch: its file's name


class Patches(NamedTuple):
    """The files of Camelyon17, in the order of metadata.csv.

    Attributes:
        tree: split or hospital -> class -> files.
        hospitals: of each file.
    """

    tree: Tree
    hospitals: dict[Path, str]


def reviews(root: Path) -> dict[str, Table]:
    """Return the reviews of each named split of Amazon, with their stars and reviewers; read once in a process.

    Raises:
        UserError: a file, a column or a split is missing, or a line is broken.
    """
    facts = [path.stat() for name in (REVIEWS, USERS) if (path := root / name).is_file()]
    return _reviews(root, tuple((each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in facts))


@lru_cache(maxsize=1)
def _reviews(root: Path, stamp: tuple[tuple[int, ...], ...]) -> dict[str, Table]:
    del stamp  # another one is another file
    found: dict[str, list[tuple[str, str, str]]] = {name: [] for name in sorted(SPLITS.values())}
    texts = _rows(root / REVIEWS, ("overall", "reviewText", "reviewerID"))
    for review, part in zip_longest(texts, _rows(root / USERS, ("split",))):
        if review is None or part is None:
            shorter = USERS if part is None else REVIEWS
            raise UserError(
                f"{REVIEWS} and {USERS} in {root} must have the same number of rows, but {shorter} has fewer: unpack "
                "the archive again."
            )
        (number, (stars, text, reviewer)), (line, (split,)) = review, part
        if split != "-1":
            name = _known(split, SPLITS, root / USERS, line, "split")
            found[name].append((_known(stars, WRITTEN, root / REVIEWS, number, "overall"), text, reviewer))
    if lacking := [name for name, rows in found.items() if not rows]:
        raise UserError(f"{root / USERS} must name rows of each split, got none of {', '.join(lacking)}.")
    return {name: _table(rows) for name, rows in found.items()}


def _table(rows: list[tuple[str, str, str]]) -> Table:
    labels, texts, reviewers = zip(*rows, strict=True)
    return Table(texts, labels, reviewers)


def patches(root: Path, *, by_hospital: bool) -> Patches:
    """Return the patches of Camelyon17 in its named splits, or by hospital; whether the files exist is not checked.

    Raises:
        UserError: metadata.csv, a column, a split or a hospital is missing, or a line is broken.
    """
    path = root / METADATA
    names = [f"hospital_{each}" for each in HOSPITALS] if by_hospital else sorted({*OWN.values(), *WHOLE.values()})
    tree: Tree = {name: {kind: [] for kind in KINDS.values()} for name in names}
    hospitals = {}
    for line, (tumor, center, split, *place) in _rows(path, ("tumor", "center", "split", *PLACE)):
        for column, number in zip(PLACE, place, strict=True):
            if not (number.isascii() and number.isdecimal()):
                raise UserError(f"Line {line} of {path} must have a whole number as {column}, got {number!r}.")
        hospital = _known(center, {each: f"hospital_{each}" for each in HOSPITALS}, path, line, "center")
        part = WHOLE[center] if center in WHOLE else _known(split, OWN, path, line, "split")
        patient, node, x, y = place
        folder = f"patient_{patient}_node_{node}"
        file = root / PATCHES / folder / f"patch_{folder}_x_{x}_y_{y}.png"
        tree[hospital if by_hospital else part][_known(tumor, KINDS, path, line, "tumor")].append(file)
        hospitals[file] = hospital
    return Patches(tree, hospitals)


def check_present(tree: Tree) -> None:
    """Refuse patches that are named and are not there.

    Raises:
        UserError: names the first.
    """
    if lacking := next((file for file in files_of(tree) if not file.exists()), None):
        raise UserError(f"There is no file {lacking}, which {METADATA} names: unpack the archive again.")


def _known(written: str, names: dict[str, str], path: Path, line: int, column: str) -> str:
    if written not in names:
        raise UserError(f"Line {line} of {path} must have one of {', '.join(names)} as {column}, got {written[:40]!r}.")
    return names[written]


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the last line of each row of a table, and its values of some columns."""
    if not path.is_file():
        raise UserError(f"There is no file {path}: unpack the archive of WILDS again.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
            if lacking := [name for name in columns if name not in header]:
                raise UserError(
                    f"{path} must have the column {lacking[0]}, got {', '.join(header)[:200] or 'no header'}."
                )
            places = [header.index(name) for name in columns]
            for row in filter(None, rows):
                if len(row) != len(header):
                    raise UserError(
                        f"Line {rows.line_num} of {path} must have {len(header)} values, as the header, got {len(row)}."
                    )
                yield rows.line_num, tuple(row[place] for place in places)
        except csv.Error as error:
            raise UserError(
                f"Line {rows.line_num} of {path} is not CSV ({error}): unpack the archive again."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} must be UTF-8 text, but is not after line {rows.line_num}.") from error
