"""From a file to bytes: an image as DomainBed evaluates it, and as it is cropped for training. No torch."""

import hashlib
import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from flatlab.errors import UserError

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

# The smallest crop that DomainBed draws, 0.7 of the area with a ratio of 4/3, is 0.72 of a square's side: stored at
# 1.4 times the wanted size it is not enlarged.
MARGIN = 1.4
THREADS = max(2, min(16, os.cpu_count() or 1))  # Pillow's decoders release Python's lock
AHEAD = 8  # files in work for each thread


class Picture(NamedTuple):
    """A decoded image.

    Attributes:
        square: (3, size, size), both sides resized, the aspect ratio not kept: for evaluation.
        original: (3, h, w), in its own aspect ratio, the shorter side at most `stored_side(size)`: for training.
        digest: SHA-256 of the file.
    """

    square: Pixels
    original: Pixels
    digest: bytes


def stored_side(size: int) -> int:
    """Return how long the shorter side of an original may be in pixels."""
    return math.ceil(MARGIN * size)


def decode(path: Path, size: int) -> Picture:
    """Decode an image: RGB, bilinear, not turned by its EXIF orientation (as ImageFolder).

    Args:
        path: the file.
        size: pixels on a side.

    Raises:
        UserError: where it is none; names the file.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            # A palette by way of RGBA: the same colours, and Pillow does not warn of the transparency it drops.
            plain = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is empty or not an image; replace or remove it.") from error
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it.") from error
    share = min(1.0, stored_side(size) / min(plain.size))
    width, height = (round(side * share) for side in plain.size)
    return Picture(_resized(plain, size, size), _resized(plain, width, height), hashlib.sha256(content).digest())


def _resized(image: Image.Image, width: int, height: int) -> Pixels:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def in_order(act: Callable[[Path], T], paths: Iterable[Path]) -> Iterator[T]:
    """Yield what `act` makes of each path, in their order, computed by threads that are a few files ahead."""
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for path in paths:
                pending.append(pool.submit(act, path))
                if len(pending) > AHEAD * THREADS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
