"""Images decoded once: bytes in two memory-mapped files, with an index that contains their hashes.

    <cache>/<data set>-<size>-<key>/index.json  squares.bin  originals.bin

The key is a hash of the files' names, sizes and times, so that a changed folder has another entry; `ctime` is included,
since a program that writes in place can set a file's other times, but not that one. An entry is complete or absent: it
is built in a neighbouring folder, under a lock that is released when its process ends, and renamed. The fingerprint is
computed from the files' own bytes: it is the same on each machine and for each decoder, stored or not. Torch-free.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from filelock import FileLock

from flatlab.arguments import Report
from flatlab.data.decode import decode, file_digest, in_order, stored_side
from flatlab.data.folders import Listing, listing
from flatlab.errors import UserError

FORMAT = 1  # of an entry; part of its key
DAY = 86400.0
LIMIT = 32 * 2**30  # bytes of an entry: all of DomainBed's but DomainNet (at 224 pixels 250 GiB)
SQUARES, ORIGINALS = "squares.bin", "originals.bin"


@dataclass(frozen=True)
class Entry:
    """A data set's images.

    Attributes:
        listing: their files.
        image_size: pixels on a side of the squares.
        folder: folder of the entry.
        fingerprint: SHA-256 over names, classes, and each file's bytes.
        sizes: (n, 2) height and width of each original; empty if the images are too many to be stored.
    """

    listing: Listing
    image_size: int
    folder: Path
    fingerprint: str
    sizes: npt.NDArray[np.int64]

    @property
    def stored(self) -> bool:
        """Whether the decoded images are kept."""
        return len(self.sizes) > 0


def default_folder() -> Path:
    """Return FLATLAB_CACHE, or flatlab's folder where the platform keeps caches."""
    if own := os.environ.get("FLATLAB_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flatlab"
    usual = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return (Path(usual) if usual else Path.home() / ".cache") / "flatlab"


def prepare(
    dataset: str,
    *,
    data_dir: Path | None,
    image_size: int,
    cache: Path | None = None,
    report: Report | None = None,
) -> Entry:
    """Return a data set's entry, and build it if there is none; waits for another process that is building it.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data; see `catalog.locate`.
        image_size: pixels on a side.
        cache: the cache's folder; by default `default_folder()`.
        report: called with (images read, images in all) after each image.

    Raises:
        UserError: if the size, a folder, a class or an image is invalid, or the entry is damaged.
    """
    if image_size < 1:
        raise UserError(f"image_size must be an integer >= 1, got {image_size}.")
    return _entry(listing(dataset, data_dir), image_size, cache, report)


def fingerprint(dataset: str, *, data_dir: Path | None, cache: Path | None = None) -> str:
    """Return a data set's fingerprint: files are read once, and again when their sizes or times change.

    Args:
        dataset: a catalog name, or `folder:NAME`.
        data_dir: folder of the data; see `catalog.locate`.
        cache: the cache's folder; by default `default_folder()`.

    Raises:
        UserError: if a folder or class is invalid, or the entry is damaged.
    """
    return _entry(listing(dataset, data_dir), 0, cache, None).fingerprint


def _entry(found: Listing, image_size: int, cache: Path | None, report: Report | None) -> Entry:
    """Return the entry of these files at a size; at size 0 one that contains only their hashes."""
    name = re.sub(r"\W+", "-", found.name)
    folder = (cache or default_folder()) / f"{name}-{image_size}-{_key(found, image_size)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            _build(found, image_size, folder, report or (lambda done, of: None))
        if os.access(folder, os.W_OK):  # not if it is another user's
            os.utime(folder)  # its last use, for `evict`
        return _open(found, image_size, folder)


def evict(folder: Path, keep: int) -> list[Path]:
    """Delete the least recently opened entries until the others fit in a size; return the deleted folders.

    An entry that was opened within the last day stays, since a process may be reading it.

    Args:
        folder: the cache.
        keep: bytes of all entries that stay.
    """
    entries = [path.parent for path in folder.glob("[!.]*/index.json")]
    sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    removed = []
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if sum(sizes.values()) <= keep or time.time() - entry.stat().st_mtime < DAY:
            break
        with FileLock(entry.with_name(f".{entry.name}.lock")):
            gone = entry.with_name(f".{entry.name}.partial")  # removed by the next build if this process is killed
            shutil.rmtree(gone, ignore_errors=True)
            entry.rename(gone)
            shutil.rmtree(gone)
        del sizes[entry]
        removed.append(entry)
    return removed


def _key(found: Listing, image_size: int) -> str:
    """Return a hash of the names, sizes and times of these files, of the image size, and of Pillow's version."""
    digest = hashlib.sha256(repr((FORMAT, PIL.__version__, found.name, found.classes, image_size)).encode())
    for domain in found.tree:
        for path in found.paths(domain):
            facts = path.stat()
            times = (facts.st_mtime_ns, facts.st_ctime_ns)
            digest.update(repr((domain, path.parent.name, path.name, facts.st_size, times)).encode())
    return digest.hexdigest()[:16]


def _build(found: Listing, image_size: int, folder: Path, report: Report) -> None:
    partial_ = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_, ignore_errors=True)  # of a killed process; the lock is held here
    partial_.mkdir()
    try:
        write = _store if image_size and _needed(found, image_size) <= LIMIT else _hash_only
        facts = write(found, image_size, partial_, report)
        _write_index(partial_ / "index.json", facts)
        os.replace(partial_, folder)
    except BaseException:
        shutil.rmtree(partial_, ignore_errors=True)
        raise


def _needed(found: Listing, image_size: int) -> int:
    """Return the approximate size in bytes of the decoded images, assuming originals of 4:3."""
    return int(found.count * 3 * (image_size**2 + stored_side(image_size) ** 2 * 4 / 3))


def _store(found: Listing, image_size: int, folder: Path, report: Report) -> dict[str, Any]:
    """Decode all images into two files, whose content is hashed before it is written."""
    sizes, digests = [], []
    hashes = {SQUARES: hashlib.sha256(), ORIGINALS: hashlib.sha256()}
    paths = [path for domain in found.tree for path in found.paths(domain)]
    with (folder / SQUARES).open("wb") as squares, (folder / ORIGINALS).open("wb") as originals:
        for picture in in_order(partial(decode, size=image_size), paths):
            for file, name, pixels in ((squares, SQUARES, picture.square), (originals, ORIGINALS, picture.original)):
                content = pixels.tobytes()
                hashes[name].update(content)
                file.write(content)
            sizes.append(picture.original.shape[1:])
            digests.append(picture.digest)
            report(len(sizes), len(paths))
        for file in (squares, originals):
            file.flush()
            os.fsync(file.fileno())
    written = {name: digest.hexdigest() for name, digest in hashes.items()}
    return {"fingerprint": _fingerprint(found, digests), "sizes": sizes, "files": written}


def _hash_only(found: Listing, image_size: int, folder: Path, report: Report) -> dict[str, Any]:
    """Read all files for their fingerprint only; they are decoded on access."""
    digests = []
    for digest in in_order(file_digest, [path for domain in found.tree for path in found.paths(domain)]):
        digests.append(digest)
        report(len(digests), found.count)
    return {"fingerprint": _fingerprint(found, digests), "sizes": [], "files": {}}


def _fingerprint(found: Listing, digests: list[bytes]) -> str:
    counts = {domain: [len(files[each]) for each in found.classes] for domain, files in found.tree.items()}
    return hashlib.sha256(repr((found.name, found.classes, counts)).encode() + b"".join(digests)).hexdigest()


def _write_index(path: Path, facts: dict[str, Any]) -> None:
    text = json.dumps(facts)
    with path.open("w") as file:
        json.dump({"sha256": hashlib.sha256(text.encode()).hexdigest(), "facts": text}, file)
        file.flush()
        os.fsync(file.fileno())


def _open(found: Listing, image_size: int, folder: Path) -> Entry:
    """Read an entry's index, and hash the files it lists: 5 s for PACS at 224 pixels on two busy cores, 0.6 s at 64."""
    try:
        index = json.loads((folder / "index.json").read_bytes())
        facts = json.loads(index["facts"])
        intact = hashlib.sha256(index["facts"].encode()).hexdigest() == index["sha256"]
        actual = dict(zip(facts["files"], in_order(file_digest, map(folder.joinpath, facts["files"])), strict=True))
        intact &= all(digest.hex() == facts["files"][name] for name, digest in actual.items())
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{folder} is damaged: its content does not match its hash. Delete it to create it again.")
    sizes = np.array(facts["sizes"], dtype=np.int64).reshape(-1, 2)
    return Entry(found, image_size, folder, facts["fingerprint"], sizes)
