"""Reading a data set into memory: the embedded digits, or DomainBed's folders root/domain/class/image."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from flatlab.data import catalog, digits
from flatlab.data.domains import Domain, DomainSet
from flatlab.errors import UserError

Tree = dict[str, dict[str, list[Path]]]  # domain -> class -> image files, each level in sorted order
Report = Callable[[int, int], None]  # images read so far, images in all

SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"])
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # pixels on a side: what ImageNet's backbones were trained on
MEMORY_LIMIT = 8 * 2**30  # bytes of decoded images; PACS at 224 pixels takes 1.4 GiB


def load(
    dataset: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    report: Report | None = None,
) -> DomainSet:
    """Return a data set, decoded and resized, in memory.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: where the folders lie; see `catalog.locate`.
        image_size: pixels on a side, the aspect ratio not kept (as DomainBed); by default 224, and 16 for digits.
        report: called with (images read, images in all) after each image.

    Raises:
        UserError: the size does not suit, or a folder, class or image is not as it should be.
    """
    name = catalog.canonical(dataset)
    if name == "digits":
        if image_size not in {None, digits.SIZE}:
            raise UserError(f"digits are {digits.SIZE} x {digits.SIZE} pixels; leave --image-size {image_size} out.")
        return digits.load()
    tree = _scan(name, data_dir)
    classes = _classes(name, tree)
    size = IMAGE_SIZE if image_size is None else image_size
    _refuse_size(name, sum(map(_count, tree.values())), size)
    return DomainSet(name, _decode(tree, classes, size, report), classes, mean=IMAGENET_MEAN, std=IMAGENET_STD)


class Row(NamedTuple):
    """What `check` found of one domain.

    Attributes:
        domain: its name.
        classes: number of classes that have images.
        images: number of images found.
        expected: number of images that the catalog gives; None where it gives none.
    """

    domain: str
    classes: int
    images: int
    expected: int | None

    @property
    def ok(self) -> bool:
        """Whether the count is the catalog's, or there is none to compare with."""
        return self.expected in {None, self.images}


def check(dataset: str, data_dir: Path | None) -> list[Row]:
    """Return each domain's counts beside the catalog's; no folder's image is opened."""
    name, known = catalog.canonical(dataset), catalog.facts(dataset)
    expected = known.domains if known else {}
    if name == "digits":
        found = [(each.name, len(set(each.labels.tolist())), len(each)) for each in digits.load().domains]
    else:
        tree = _scan(name, data_dir)
        found = [(domain, sum(map(bool, files.values())), _count(files)) for domain, files in tree.items()]
    return [Row(domain, classes, images, expected.get(domain)) for domain, classes, images in found]


def _scan(dataset: str, data_dir: Path | None) -> Tree:
    root = catalog.locate(dataset, data_dir)
    names = catalog.domain_names(dataset, data_dir)
    return {name: {each.name: _images(each) for each in catalog.subfolders(root / name)} for name in names}


def _images(folder: Path) -> list[Path]:
    """Return a folder's image files by name, as ImageFolder sorts them; macOS hides `._photo.jpg` among them."""
    files = (each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES and each.name[0] != ".")
    return sorted(files, key=lambda each: each.name)


def _count(files: dict[str, list[Path]]) -> int:
    return sum(map(len, files.values()))


def _classes(dataset: str, tree: Tree) -> tuple[str, ...]:
    """Return the class names in label order, once every domain has images of every class."""
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


def _refuse_size(dataset: str, count: int, size: int) -> None:
    if size < 1:
        raise UserError(f"An image size is a number of pixels from 1 on, not {size}.")
    needed = count * 3 * size * size
    if needed > MEMORY_LIMIT:
        fits = math.isqrt(MEMORY_LIMIT // (3 * count))
        raise UserError(
            f"{dataset} has {count:,} images, which at {size} x {size} pixels take {needed / 2**30:.1f} GiB of memory; "
            f"flatlab holds at most {MEMORY_LIMIT / 2**30:.0f} GiB. Pass --image-size {fits} or smaller."
        )


def _decode(tree: Tree, classes: tuple[str, ...], size: int, report: Report | None) -> tuple[Domain, ...]:
    """Read all images with a few threads: Pillow's decoders release Python's lock."""
    domains = tuple(_blank(name, files, classes, size) for name, files in tree.items())
    paths = [path for files in tree.values() for each in classes for path in files[each]]
    with ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 1))) as pool:
        for done, _ in enumerate(pool.map(_read_into, _slots(domains), paths), start=1):
            if report:
                report(done, len(paths))
    return domains


def _blank(name: str, files: dict[str, list[Path]], classes: tuple[str, ...], size: int) -> Domain:
    """Return a domain with its labels, sorted by class, and room for its images."""
    counts = torch.tensor([len(files[each]) for each in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return Domain(name, torch.empty((len(labels), 3, size, size), dtype=torch.uint8), labels)


def _slots(domains: tuple[Domain, ...]) -> Iterator[np.ndarray]:
    """Yield a (3, S, S) view of each image's place in memory."""
    for domain in domains:
        yield from domain.images.numpy()


def _read_into(slot: np.ndarray, path: Path) -> None:
    """Decode one image into its slot: RGB, bilinear, not turned by its EXIF orientation (as ImageFolder)."""
    try:
        with Image.open(path) as image:
            # A palette by way of RGBA: the same colours, and Pillow does not warn of the transparency it drops.
            plain = image.convert("RGBA") if image.mode == "P" else image
            resized = plain.convert("RGB").resize(slot.shape[1:], Image.Resampling.BILINEAR)
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is empty or not an image; replace or remove it.") from error
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it.") from error
    slot[...] = np.asarray(resized).transpose(2, 0, 1)
