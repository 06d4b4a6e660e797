"""Files in folders root/domain/class and below, each folder once. No image is opened."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from flatlab.errors import UserError

Tree = dict[str, dict[str, list[Path]]]  # domain -> class -> image files, each level in sorted order

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"])


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name.

    Hidden folders, archive leftovers, and links to the folder itself or to a parent are skipped.
    """
    above = {folder.resolve(), *folder.resolve().parents}
    found = (each for each in folder.iterdir() if each.is_dir() and not each.name.startswith((".", "__")))
    return sorted((each for each in found if each.resolve() not in above), key=lambda each: each.name)


def images_below(root: Path, domains: Iterable[str]) -> Tree:
    """Return the image files in each class folder and below it, as ImageFolder sorts them; hidden files are skipped.

    A folder counts once, for the class that contains it: links to it, and loops of links, add nothing.

    Args:
        root: the folder of the domains.
        domains: their names.
    """
    classes = {(domain, each.name): each for domain in domains for each in subfolders(root / domain)}
    levels: dict[tuple[str, str], list[tuple[Path, list[str]]]] = {owner: [] for owner in classes}
    home = root.resolve()
    seen = {home, *home.parents, *((root / domain).resolve() for domain in domains)}
    # Links are followed last: a folder belongs to the class that contains it, not to one with a link to it.
    queue = deque(sorted(classes.items(), key=lambda item: item[1].resolve() != home.joinpath(*item[0])))
    while queue:
        owner, start = queue.popleft()
        for level, names, links in _walk(start, seen):
            levels[owner].append((level, names))
            queue.extend((owner, link) for link in links)
    tree: Tree = {domain: {} for domain in domains}
    for (domain, each), found in levels.items():
        tree[domain][each] = [level / name for level, names in sorted(found) for name in sorted(names)]
    return tree


def _walk(start: Path, seen: set[Path]) -> Iterator[tuple[Path, list[str], list[Path]]]:
    """Yield each unseen folder from `start` on, the names of its images, and its links to folders."""
    for path, folders, names in os.walk(start):
        level, real = Path(path), Path(path).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield (
            level,
            [name for name in names if _is_image(name)],
            [level / e for e in folders if (level / e).is_symlink()],
        )


def _is_image(name: str) -> bool:
    return name[0] != "." and Path(name).suffix.lower() in SUFFIXES


def files_of(tree: Tree) -> Iterator[Path]:
    """Yield the files of all domains and classes."""
    return (file for classes in tree.values() for files in classes.values() for file in files)


def check_regular(tree: Tree) -> None:
    """Refuse files that are not regular, such as pipes, devices and links to nothing.

    Raises:
        UserError: names the first.
    """
    if found := next((file for file in files_of(tree) if not file.is_file()), None):
        raise UserError(f"{found} is not a regular file; replace or remove it.")
