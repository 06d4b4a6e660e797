"""DomainBed's folders root/domain/class/image: their content, and faults in it. Torch-free."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flatlab.arguments import Report
from flatlab.data import catalog, wilds
from flatlab.data.decode import fault, in_order
from flatlab.data.trees import Tree, check_regular, images_below, subfolders
from flatlab.errors import UserError


@dataclass(frozen=True)
class Listing:
    """The image files of a data set whose every domain has images of every class.

    Attributes:
        name: name of the data set.
        classes: the classes' names, in label order.
        tree: the files.
        groups: of each file, where a data set has groups.
    """

    name: str
    classes: tuple[str, ...]
    tree: Tree
    groups: Mapping[Path, str] = field(default_factory=dict)

    def paths(self, domain: str) -> list[Path]:
        """Return a domain's files, class by class, as ImageFolder sorts them."""
        return [path for each in self.classes for path in self.tree[domain][each]]

    def labels(self, domain: str) -> npt.NDArray[np.int64]:
        """Return the label of each of a domain's files."""
        return np.repeat(np.arange(len(self.classes)), [len(self.tree[domain][each]) for each in self.classes])

    def grouped(self, domain: str) -> list[str]:
        """Return the group of each of a domain's files; empty if there are no groups."""
        return [self.groups[path] for path in self.paths(domain)] if self.groups else []

    @property
    def count(self) -> int:
        """The number of files."""
        return sum(map(_count, self.tree.values()))


def listing(dataset: str, data_dir: Path | None) -> Listing:
    """Return the files of a data set.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data; see `catalog.locate`.

    Raises:
        UserError: if the folder does not exist, a class is missing or unknown, or a file is not a regular one.
    """
    name = catalog.canonical(dataset)
    root, known = catalog.locate(name, data_dir), catalog.facts(name)
    if known and known.files:
        tree, groups = catalog.patches(name, root)
        wilds.check_present(tree)
    else:
        tree, groups = images_below(root, catalog.domain_names(name, data_dir)), {}
    check_regular(tree)
    return Listing(name, _classes(name, tree), tree, groups if known and known.held_out else {})


def _count(files: Mapping[str, list[Path]]) -> int:
    return sum(map(len, files.values()))


def _classes(dataset: str, tree: Tree) -> tuple[str, ...]:
    """Return the class names in label order; every domain must have images of every class."""
    classes = tuple(sorted(set().union(*tree.values())))
    known = catalog.facts(dataset)
    if known and known.classes not in {classes, len(classes)}:
        expected = known.classes if isinstance(known.classes, int) else ", ".join(known.classes)
        raise UserError(
            f"{dataset} has the wrong classes: expected {expected}; found {len(classes)}: {', '.join(classes)}."
        )
    for domain, files in tree.items():
        for each in classes:
            if not files.get(each):
                raise UserError(
                    f"Class {each!r} has no images in domain {domain!r} of {dataset}; every domain needs at least "
                    f"one image of each class: add one, or remove the class from all domains."
                )
    return classes


# --- the check ---


class Row(NamedTuple):
    """Result of `check` for one domain.

    Attributes:
        domain: its name.
        classes: number of classes that have images.
        images: number of images found.
        expected: number of images that the catalog gives; None if it gives none.
        off: the faults, as text; empty if there are none.
        unreadable: a sentence on each image that cannot be decoded.
    """

    domain: str
    classes: int
    images: int
    expected: int | None
    off: str = ""
    unreadable: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.off


def check(dataset: str, data_dir: Path | None, *, report: Report | None = None) -> list[Row]:
    """Return each domain's counts, the catalog's, and faults; an absent domain has no images.

    Every image is decoded, as training would.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data; see `catalog.locate`.
        report: called with (images read, images in all) after each image.
    """
    name, known = catalog.canonical(dataset), catalog.facts(dataset)
    counts = known.domains if known else {}
    if catalog.is_text(name):
        found = catalog.sentences(name, data_dir)
        numbers = {each: (len(set(own.labels)), len(own.labels)) for each, own in found.items()}
        return [
            Row(each, classes, count, counts.get(each), _difference(count, counts.get(each), "sentences"))
            for each, (classes, count) in numbers.items()
        ]
    if name == "digits":
        from flatlab.data import digits  # embedded, and made with torch

        return [Row(d.name, len(set(d.labels.tolist())), len(d), counts[d.name]) for d in digits.load().domains]
    root = catalog.place(name, data_dir)
    if (known and known.files) or not any((root / each).is_dir() for each in (known.domains if known else ("",))):
        root = catalog.locate(name, data_dir)  # raises if no domain is there
    names = tuple(known.domains) if known else catalog.domain_names(name, data_dir)
    if known and known.files:
        tree = catalog.patches(name, root).tree
    else:
        tree = images_below(root, [each for each in names if (root / each).is_dir()])
    expected, faults = _expected_classes(known, tree), _undecodable(tree, report or (lambda done, of: None))
    rows = [
        _row(each, tree.get(each), expected, known.domains[each] if known else None, faults.get(each, ()))
        for each in names
    ]
    unknown = [each.name for each in subfolders(root) if known and each.name not in (*names, *known.files)]
    return rows + [Row(each, 0, 0, 0, "no domain of this data set") for each in unknown]


def _undecodable(tree: Tree, report: Report) -> dict[str, tuple[str, ...]]:
    """Return, by domain, a sentence on each image that cannot be decoded."""
    found: dict[str, tuple[str, ...]] = {}
    done, of = 0, sum(map(_count, tree.values()))
    for domain, classes in tree.items():
        sentences = []
        for sentence in in_order(fault, [path for files in classes.values() for path in files]):
            sentences += [sentence] * bool(sentence)
            done += 1
            report(done, of)
        found[domain] = tuple(sentences)
    return found


def _expected_classes(known: catalog.Facts | None, tree: Tree) -> tuple[str, ...]:
    """Return the classes that each domain should have: the catalog's, or all that any domain has."""
    if known and not isinstance(known.classes, int):
        return known.classes
    return tuple(sorted({each for files in tree.values() for each, images in files.items() if images}))


def _row(
    domain: str,
    files: Mapping[str, list[Path]] | None,
    classes: tuple[str, ...],
    count: int | None,
    unreadable: tuple[str, ...],
) -> Row:
    if files is None:
        return Row(domain, 0, 0, count, "there is no such folder")
    found = {each for each, images in files.items() if images}
    off = [*_faults(found, set(files), set(classes), _count(files), count)]
    if unreadable:
        off.append(f"{len(unreadable):,} image{'s' * (len(unreadable) > 1)} cannot be decoded")
    return Row(domain, len(found), _count(files), count, "; ".join(off), unreadable)


def _faults(found: set[str], folders: set[str], classes: set[str], images: int, expected: int | None) -> Iterator[str]:
    if missing := sorted(classes - found):
        yield f"no images of {', '.join(missing)}"
    if unknown := sorted(folders - classes):
        yield f"unknown classes {', '.join(unknown)}"
    if difference := _difference(images, expected, "images"):
        yield difference


def _difference(found: int, expected: int | None, what: str) -> str:
    if expected is None or found == expected:
        return ""
    return f"{abs(found - expected):,} {what} {'more' if found > expected else 'fewer'} than {expected:,}"
