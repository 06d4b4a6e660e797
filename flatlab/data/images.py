"""Images that are not one tensor: of any sizes, in a flat tensor; or files that are decoded on access."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.data.decode import Picture, decode, in_order


class Originals(Protocol):
    """Pictures in their own aspect ratios."""

    def pick(self, rows: Tensor) -> list[Tensor]:
        """Return the pictures of these rows, each (C, h, w) uint8."""

    def to(self, device: torch.device) -> "Originals":
        """Return the same pictures, on a device."""


class Ragged:
    """Pictures of any sizes, one after another in a flat tensor.

    Args:
        pixels: flat, uint8.
        sizes: (n, 2) heights and widths.
        channels: number of channels of each.
    """

    def __init__(self, pixels: Tensor, sizes: npt.NDArray[np.int64], *, channels: int = 3) -> None:
        self.pixels, self.sizes, self.channels = pixels, sizes, channels
        self.ends = np.cumsum(sizes.prod(axis=1) * channels)

    @classmethod
    def of(cls, images: Tensor) -> "Ragged":
        """Return (N, C, H, W) images as pictures, all of one size."""
        count, channels, *size = images.shape
        return cls(images.reshape(-1), np.tile(np.array(size), (count, 1)), channels=channels)

    def pick(self, rows: Tensor) -> list[Tensor]:
        """Return the pictures of these rows, each (C, h, w) uint8."""
        return [self._picture(row) for row in rows.tolist()]

    def _picture(self, row: int) -> Tensor:
        (height, width), end = self.sizes[row].tolist(), int(self.ends[row])
        return self.pixels[end - self.channels * height * width : end].view(self.channels, height, width)

    def to(self, device: torch.device) -> "Ragged":
        """Return the same pictures, on a device."""
        return Ragged(self.pixels.to(device), self.sizes, channels=self.channels)


class Decoded:
    """Image files that threads decode on each access: for data sets too large to be stored decoded.

    Indexing by rows returns squares, as for a tensor of images; `pick` returns originals.

    Args:
        paths: the files.
        size: pixels on a side.
        device: device of the returned images.
    """

    def __init__(self, paths: Sequence[Path], size: int, device: torch.device | None = None) -> None:
        self.paths, self.size, self.device = paths, size, device or torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape that all squares together would have."""
        return len(self.paths), 3, self.size, self.size

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the squares of these rows, (n, 3, size, size) uint8."""
        return torch.stack([torch.from_numpy(each.square.copy()) for each in self._read(rows)]).to(
            self.device, non_blocking=True
        )

    def pick(self, rows: Tensor) -> list[Tensor]:
        """Return the originals of these rows, each (3, h, w) uint8."""
        return [torch.from_numpy(each.original.copy()).to(self.device, non_blocking=True) for each in self._read(rows)]

    def _read(self, rows: Tensor) -> list[Picture]:
        return list(in_order(partial(decode, size=self.size), [self.paths[row] for row in rows.tolist()]))

    def to(self, device: torch.device) -> "Decoded":
        """Return the same files, their images on a device."""
        return Decoded(self.paths, self.size, device)
