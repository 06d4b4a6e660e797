"""The data sets known by name: their domains, their folders, and the held-out domain.

Torch-free: a held-out domain is checked before anything is loaded. Index order is DomainBed's, the sorted folder names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flatlab.data import wilds
from flatlab.data.text import tables
from flatlab.data.trees import Tree, images_below, subfolders
from flatlab.errors import UserError, choose


@dataclass(frozen=True)
class Facts:
    """Facts about a data set that are known before it is read.

    Attributes:
        folder: name of its folder on disk; empty for embedded data.
        domains: name of each domain, in index order, and its number of images; None if published counts differ.
        classes: the names of the classes, in label order, or only their number.
        files: what its folder has instead of a folder for each domain.
        held_out: the only domains that can be held out, where `domains` are named splits, of which "train" is trained
            on; empty: each domain can be.
    """

    folder: str
    domains: Mapping[str, int | None]
    classes: tuple[str, ...] | int
    files: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


# Counts: PACS as on its project page, VLCS as listed in salesforce/ensemble-of-averages, OfficeHome and DomainNet
# (duplicates removed) as their authors give them; each column sums to the total that DomainBed prints.
HOSPITALS = "Camelyon17-hospitals"  # the same patches, to hold out any hospital
CATALOG: dict[str, Facts] = {
    "digits": Facts("", {"rot0": 450, "rot15": 449, "rot30": 449, "rot45": 449}, tuple("0123456789")),
    "PACS": Facts(
        "PACS",
        {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929},
        ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"),
    ),
    "VLCS": Facts(
        "VLCS",
        {"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376},
        ("bird", "car", "chair", "dog", "person"),
    ),
    "OfficeHome": Facts("office_home", {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357}, 65),
    # SWAD (24,330 images) and DomainBed (24,788) build it from different annotation files: no count is the right one.
    "TerraIncognita": Facts(
        "terra_incognita",
        {"location_100": None, "location_38": None, "location_43": None, "location_46": None},
        ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel"),
    ),
    "DomainNet": Facts(
        "domain_net",
        {
            "clipart": 48129,
            "infograph": 51605,
            "painting": 72266,
            "quickdraw": 172500,
            "real": 172947,
            "sketch": 69128,
        },
        345,
    ),
    "sentences": Facts("", {"amazon": 2943, "movie": 10043, "nyt": 2788, "tweets": 3362}, ("negative", "positive")),
    "Amazon": Facts(
        "amazon_v2.1",
        {"id_test": 46950, "id_val": 46950, "test": 100050, "train": 245502, "val": 100050},
        wilds.STARS,
        files=(wilds.REVIEWS, wilds.USERS),
        held_out=("test",),
    ),
    "Camelyon17": Facts(
        "camelyon17_v1.0",
        {"id_val": 33560, "test": 85054, "train": 302436, "val": 34904},
        ("normal", "tumor"),
        files=(wilds.METADATA, wilds.PATCHES),
        held_out=("test",),
    ),
    HOSPITALS: Facts(
        "camelyon17_v1.0",
        {"hospital_0": None, "hospital_1": 34904, "hospital_2": 85054, "hospital_3": None, "hospital_4": None},
        ("normal", "tumor"),
        files=(wilds.METADATA, wilds.PATCHES),
    ),
}


FOLDERS = ("folder", "folder-text")  # the user's own images, DOMAIN/CLASS/IMAGE, and sentences, DOMAIN.tsv


def canonical(dataset: str) -> str:
    """Return the data set's name as the catalog spells it; `folder:NAME` and `folder-text:NAME` keep their NAME."""
    kind, _, name = dataset.partition(":")
    if kind.strip().lower() in FOLDERS and name.strip():
        return f"{kind.strip().lower()}:{name.strip()}"
    return choose("dataset", dataset, [*CATALOG, *(f"{each}:NAME" for each in FOLDERS)])


def is_text(dataset: str) -> bool:
    """Whether a data set consists of sentences, not images."""
    return canonical(dataset).partition(":")[0] in ("sentences", "folder-text", "Amazon")


def facts(dataset: str) -> Facts | None:
    """Return the catalog's entry of a data set; None for `folder:NAME`."""
    return CATALOG.get(canonical(dataset))


def locate(dataset: str, data_dir: Path | None) -> Path:
    """Return the folder of the domains of a data set.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: for `folder:NAME` that folder itself; for a catalog name the folder or its parent.

    Raises:
        UserError: if the data set is embedded, no `data_dir` is given, or the domains are not in it.
    """
    root, expected = place(dataset, data_dir), _expected(dataset)
    known = facts(dataset)
    if root.is_dir() and all(_present(root, known)):
        return root
    name = canonical(dataset)
    tried = " or ".join(map(str, _candidates(dataset, data_dir)))
    some = known and not known.files and any(_present(root, known))
    hint = f" `flatlab data check {name}` lists what is missing." if some else ""
    raise UserError(f"{name} is not in {tried}: expected {expected}. Pass its location as --data-dir.{hint}")


def _present(root: Path, known: Facts | None) -> list[bool]:
    """Return, for all that the folder of a data set must have, whether it is there."""
    if known and known.files:
        return [(root / name).exists() for name in known.files]
    return [(root / name).is_dir() for name in (known.domains if known else ())]


def _expected(dataset: str) -> str:
    if known := facts(dataset):
        return f"a folder with {', '.join(known.files or known.domains)}"
    return "a folder with one file DOMAIN.tsv per domain" if is_text(dataset) else "a folder with one folder per domain"


def _candidates(dataset: str, data_dir: Path | None) -> list[Path]:
    name, known = canonical(dataset), facts(dataset)
    if known and not known.folder:
        raise UserError(f"{name} is embedded in flatlab and has no folder; leave --data-dir out.")
    if data_dir is None:
        raise UserError(f"{name} is read from disk; pass --data-dir, {_expected(dataset)}.")
    return [data_dir, data_dir / known.folder] if known else [data_dir]


def place(dataset: str, data_dir: Path | None) -> Path:
    """Return the folder that has most of a data set's domains, not necessarily all, as `locate` requires.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: as for `locate`.
    """
    known = facts(dataset)
    return max(_candidates(dataset, data_dir), key=lambda root: sum(_present(root, known)))


def domain_names(dataset: str, data_dir: Path | None) -> tuple[str, ...]:
    """Return the names of the domains in index order, read from disk only for `folder:NAME`.

    Of a data set with named splits: those that are trained on and held out.

    Raises:
        UserError: if the folder contains fewer than two domains.
    """
    known = facts(dataset)
    if known:
        return ("train", *known.held_out) if known.held_out else tuple(known.domains)
    root = locate(dataset, data_dir)
    if is_text(dataset):
        return tuple(tables.read(root))
    names = tuple(each.name for each in subfolders(root) if subfolders(each))
    if len(names) < 2:
        raise UserError(
            f"{canonical(dataset)}: leave-one-domain-out needs at least two domains, and {root} holds "
            f"{f'only {names[0]}' if names else 'none'}; expected {root}/DOMAIN/CLASS/IMAGE."
        )
    return names


def held_out(dataset: str, data_dir: Path | None, which: str) -> tuple[str, ...]:
    """Return the domains to hold out.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data; needed only for `folder:NAME`.
        which: a domain's name, its index ("2"), several of them ("sketch,photo"), or "all". If a domain's name is a
            number, it is not read as an index.

    Raises:
        UserError: if there is no such domain.
    """
    known = facts(dataset)
    names = (known and known.held_out) or domain_names(dataset, data_dir)
    which = which.strip()
    if which.lower() == "all":
        return names
    words = [which] if which in names else [word.strip() for word in which.split(",")]
    return tuple(dict.fromkeys(_domain(dataset, names, word) for word in words))


def _domain(dataset: str, names: tuple[str, ...], word: str) -> str:
    if word in names or not word.isdecimal():
        return choose("held-out domain", word, names)
    if int(word) >= len(names):
        numbered = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise UserError(f"{canonical(dataset)} has no domain {word}; its domains are {numbered}.")
    return names[int(word)]


def sizes(dataset: str, data_dir: Path | None) -> dict[str, int]:
    """Return the number of images or sentences of each domain: from the catalog, or counted on disk if it has none."""
    known = facts(dataset)
    if known and all(known.domains.values()):
        return {name: known.domains[name] or 0 for name in domain_names(dataset, data_dir)}
    if is_text(dataset):
        return {name: len(table.texts) for name, table in sentences(dataset, data_dir).items()}
    return {name: sum(map(len, classes.values())) for name, classes in tree(dataset, data_dir).items()}


def sentences(dataset: str, data_dir: Path | None) -> dict[str, tables.Table]:
    """Return the sentences of each domain, embedded or read from disk."""
    match canonical(dataset):
        case "sentences":
            return tables.embedded()
        case "Amazon":
            return wilds.reviews(locate(dataset, data_dir))
        case _:
            return tables.read(locate(dataset, data_dir))


def tree(dataset: str, data_dir: Path | None) -> Tree:
    """Return the image files of each domain and class on disk."""
    root, known = locate(dataset, data_dir), facts(dataset)
    if known and known.files:
        return patches(dataset, root).tree
    return images_below(root, domain_names(dataset, data_dir))


def patches(dataset: str, root: Path) -> wilds.Patches:
    """Return the files of Camelyon17, in its named splits or by hospital."""
    return wilds.patches(root, by_hospital=canonical(dataset) == HOSPITALS)
