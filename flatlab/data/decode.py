"""Decoding of images: as DomainBed evaluates them, and for training crops. Torch-free."""

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
from PIL.TiffImagePlugin import TiffImageFile

from flatlab.errors import UserError

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's other decoders are not used
MOST_PIXELS = 89_478_485  # of an image, beyond which Pillow warns of a decompression bomb: 268 MB in RGB
TIFF_BITS = 258  # the tag BitsPerSample
MOST_BYTES = 2**30  # of a file: those pixels in 16 bits, uncompressed, and more

# The smallest crop that DomainBed draws, 0.7 of the area with a ratio of 4/3, is 0.72 of a square's side: stored at
# 1.4 times the wanted size it is not enlarged.
MARGIN = 1.4
THREADS = max(2, min(16, os.cpu_count() or 1))  # Pillow's decoders release Python's lock
AHEAD = 8  # files queued for each thread


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
    """Return the maximum length of the shorter side of an original, in pixels."""
    return math.ceil(MARGIN * size)


def decode(path: Path, size: int) -> Picture:
    """Decode an image: RGB, bilinear, its EXIF orientation ignored (as by ImageFolder).

    Grey values of 16 bits are scaled to 8 bits by their full range, floating-point pixels from the range 0 to 1.

    Args:
        path: the file, of one of `FORMATS`.
        size: pixels on a side.

    Raises:
        UserError: if it is not an image, or larger than `MOST_PIXELS` or `MOST_BYTES`; names the file.
    """
    content = _content(path)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(path, image)
            plain = _rgb(path, image)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise UserError(
            f"{path} is empty or not an image of a known format ({known}); replace or remove it."
        ) from error
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it.") from error
    share = min(1.0, stored_side(size) / min(plain.size))
    width, height = (round(side * share) for side in plain.size)
    return Picture(_resized(plain, size, size), _resized(plain, width, height), hashlib.sha256(content).digest())


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path} is not a regular file; replace or remove it.")
    if path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} holds {path.stat().st_size:,} bytes; an image file must hold at most {MOST_BYTES:,}.")
    return path.read_bytes()


def _check_size(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path} has {width:,} x {height:,} pixels; an image must have at most {MOST_PIXELS:,}: scale it."
        )


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    """Return an image in RGB, its values scaled by the range of its mode."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = image.tag_v2[TIFF_BITS][0] if isinstance(image, TiffImageFile) else 16
        return _grey(np.asarray(image) * (255 / (2**bits - 1)))
    if image.mode == "I":
        raise UserError(f"{path} has pixels of signed or 32-bit integers, of no known range; convert it to 16 bits.")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
            raise UserError(
                f"{path} has floating-point pixels from {values.min():.4g} to {values.max():.4g}; they must lie "
                f"between 0 and 1."
            )
        return _grey(values * 255)
    # Palettes are converted through RGBA: the same colours, and Pillow does not warn of the transparency it drops.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _grey(values: npt.NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


def fault(path: Path) -> str:
    """Return a sentence on why a file cannot be decoded; empty if it can."""
    try:
        decode(path, 1)
    except UserError as error:
        return str(error)
    return ""


def _resized(image: Image.Image, width: int, height: int) -> Pixels:
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def in_order(act: Callable[[Path], T], paths: Iterable[Path]) -> Iterator[T]:
    """Yield `act(path)` of each path, in their order; threads compute a few files ahead."""
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
