"""A data set by its name: the embedded digits or sentences, or DomainBed's folders through the cache."""

from collections.abc import Iterator
from pathlib import Path

import torch

from flatlab.arguments import Report
from flatlab.data import cache as store
from flatlab.data import catalog, digits
from flatlab.data.domains import Domain, DomainSet, numbered
from flatlab.data.images import Decoded, Ragged
from flatlab.data.text import sets
from flatlab.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # pixels on a side: what ImageNet's backbones were trained on


def load(
    dataset: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    cache: Path | None = None,
    report: Report | None = None,
) -> DomainSet:
    """Return a data set, its images decoded, resized, and mapped into memory; or decoded on access.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data; see `catalog.locate`.
        image_size: pixels on a side, the aspect ratio not kept (as DomainBed); by default 224, and 16 for digits; for
            sentences the number of word pieces, by default 48.
        cache: folder of the decoded images; see `cache.default_folder`.
        report: called with (images read, images in all) after each image that is decoded.

    Raises:
        UserError: if the size, or a folder, class or image, is invalid.
    """
    if catalog.canonical(dataset) == "digits":
        if image_size not in {None, digits.SIZE}:
            raise UserError(f"digits are {digits.SIZE} x {digits.SIZE} pixels; leave --image-size {image_size} out.")
        return digits.load()
    if catalog.is_text(dataset):
        known = catalog.facts(dataset)
        classes = known.classes if known and not isinstance(known.classes, int) else None
        return sets.load(catalog.canonical(dataset), catalog.sentences(dataset, data_dir), image_size, classes=classes)
    size = IMAGE_SIZE if image_size is None else image_size
    entry = store.prepare(dataset, data_dir=data_dir, image_size=size, cache=cache, report=report)
    found, domains = entry.listing, tuple(_stored(entry) if entry.stored else _decoded(entry))
    stamp = entry.fingerprint
    return DomainSet(found.name, domains, found.classes, mean=IMAGENET_MEAN, std=IMAGENET_STD, stamp=stamp)


def _stored(entry: store.Entry) -> Iterator[Domain]:
    """Yield the domains as views of the entry's two files, mapped into memory: unread parts take none."""
    first, offset, size = 0, 0, entry.image_size
    areas = entry.sizes.prod(axis=1)
    squares = _mapped(entry.folder / store.SQUARES, 3 * size * size * len(areas)).view(-1, 3, size, size)
    originals = _mapped(entry.folder / store.ORIGINALS, 3 * int(areas.sum()))
    for name in entry.listing.tree:
        labels = torch.from_numpy(entry.listing.labels(name))
        last = first + len(labels)
        end = offset + 3 * int(areas[first:last].sum())
        pictures = Ragged(originals[offset:end], entry.sizes[first:last])
        yield Domain(name, squares[first:last], labels, pictures, numbered(entry.listing.grouped(name)))
        first, offset = last, end


def _mapped(path: Path, count: int) -> torch.Tensor:
    """Return a file's bytes, mapped into memory; writing to them does not change the file."""
    return torch.from_file(str(path), shared=False, size=count, dtype=torch.uint8)


def _decoded(entry: store.Entry) -> Iterator[Domain]:
    for name in entry.listing.tree:
        files = Decoded(entry.listing.paths(name), entry.image_size)
        labels = torch.from_numpy(entry.listing.labels(name))
        yield Domain(name, files, labels, files, numbered(entry.listing.grouped(name)))
