"""Batches on the device: an endless stream to train on, and fixed ones to evaluate on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flatlab.data import augment
from flatlab.data.domains import DomainSet
from flatlab.data.images import Decoded, Originals, Ragged
from flatlab.errors import UserError
from flatlab.seeds import generator

LARGEST, FEWEST = 512, 16  # samples evaluated at once
CACHED = 2**18  # pixels evaluated at once on a CPU: MobileNetV2 takes 2.5 times as long for 8 times as many
KEPT = 2**28  # bytes of float32 inputs that are kept; larger sets are kept as bytes, and converted at each access


class Batch(NamedTuple):
    """One training batch: the samples of each source domain, in index order.

    Attributes:
        inputs: (B, C, H, W) float32, normalised, channels last.
        targets: (B,) int64.
        sizes: number of samples of each domain; they sum to B.
    """

    inputs: Tensor
    targets: Tensor
    sizes: tuple[int, ...]


class _Source(NamedTuple):
    """One source domain: the rows to draw from, and its images and labels, on the device."""

    name: str
    rows: Tensor
    images: Tensor | Decoded
    originals: Originals
    labels: Tensor


class TrainingStream:
    """Batches drawn with replacement, from a separate infinite stream for each source domain (as DomainBed).

    Stateless: a batch is a pure function of (seed, domain, step), the same on every device, so that a resumed run
    needs no saved state and a new domain does not change the draws of the others. Images stay bytes until they are
    gathered. Files that are decoded on each access are decoded one step ahead, during the previous step.

    Args:
        data: the data set.
        rows: source domain -> the row numbers to draw from.
        batch_size: samples of each domain in a batch.
        seed: seed of the stream.
        device: where images are kept and batches are made.
        augmented: whether DomainBed's training transform is applied to the originals; else the squares are used.

    Raises:
        UserError: if there are no rows to draw from, or images to be augmented have no colours.
    """

    def __init__(
        self,
        data: DomainSet,
        rows: Mapping[str, np.ndarray],
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        augmented: bool = False,
    ) -> None:
        if not rows or not all(map(len, rows.values())):
            raise UserError("A training stream needs at least one source domain, and at least one row of each.")
        if augmented and data.domains[0].images.shape[1] != 3:
            raise UserError(f"DomainBed's augmentation changes colours, and {data.name} has none; train without.")
        self._normalise, self._size = data.normalise, data.domains[0].images.shape[-1]
        self._batch_size, self._seed, self._augmented = batch_size, seed, augmented
        self._sources = [_source(data, name, rows[name], device, augmented) for name in sorted(rows, key=data.index)]
        self._slow = any(isinstance(source.images, Decoded) for source in self._sources)
        self._ahead: tuple[int, Future[list[list[Tensor]]]] | None = None
        self._thread = ThreadPoolExecutor(1)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        drawn = [picks.to(source.labels.device, non_blocking=True) for source, picks in self._picks(step)]
        targets = torch.cat([source.labels[picks] for source, picks in zip(self._sources, drawn, strict=True)])
        pictures = self._pictures(step)
        if self._augmented:
            draws = [self._draws(source.name, step, each) for source, each in zip(self._sources, pictures, strict=True)]
            images = augment.augment([each for part in pictures for each in part], augment.join(draws), self._size)
        else:
            images = torch.cat([part[0] for part in pictures])
        return Batch(self._normalise(images), targets, (self._batch_size,) * len(self._sources))

    def _picks(self, step: int) -> Iterator[tuple[_Source, Tensor]]:
        """Yield each source with the row numbers drawn from it."""
        for source in self._sources:
            draws = generator("batches", self._seed, source.name, step)
            yield source, source.rows[torch.randint(len(source.rows), (self._batch_size,), generator=draws)]

    def _draws(self, name: str, step: int, pictures: Sequence[Tensor]) -> augment.Draws:
        sizes = np.array([each.shape[-2:] for each in pictures], dtype=np.int64)
        return augment.draw(sizes, generator("augment", self._seed, name, step))

    def _pictures(self, step: int) -> list[list[Tensor]]:
        """Return the pictures of each source: its originals, or one tensor of squares."""
        if not self._slow:
            return self._gather(step)
        ready = self._ahead[1].result() if self._ahead and self._ahead[0] == step else self._gather(step)
        self._ahead = step + 1, self._thread.submit(self._gather, step + 1)
        return ready

    def _gather(self, step: int) -> list[list[Tensor]]:
        if self._augmented:
            return [source.originals.pick(picks) for source, picks in self._picks(step)]
        return [
            [source.images[picks.to(source.labels.device, non_blocking=True)]] for source, picks in self._picks(step)
        ]


def _source(data: DomainSet, name: str, rows: np.ndarray, device: torch.device, augmented: bool) -> _Source:
    """Return one domain of a stream; only the images that are drawn from are copied to the device."""
    domain = data.domain(name)
    images, originals = domain.images, domain.originals
    if originals is None:
        originals = Ragged.of(images) if isinstance(images, Tensor) else images
    if augmented:
        originals = originals.to(device)
    else:
        images = images.to(device)
    return _Source(domain.name, torch.tensor(rows), images, originals, domain.labels.to(device))


class _BatchesByRows(Sequence[tuple[Tensor, Tensor]]):
    """Evaluation batches kept as bytes on the device, or as the names of files if those are too many."""

    def __init__(self, data: DomainSet, chunks: Sequence[tuple[Tensor | Decoded, Tensor, Tensor]]) -> None:
        self.data, self.chunks = data, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        images, rows, targets = self.chunks[index]
        return self.data.normalise(images if isinstance(images, Tensor) else images[rows]), targets


def evaluation_batches(
    data: DomainSet,
    name: str,
    rows: np.ndarray,
    *,
    device: torch.device,
    batch_size: int | None = None,
    limit: int | None = None,
) -> Sequence[tuple[Tensor, Tensor]]:
    """Return rows of one domain as (inputs, targets) on the device, in their order, for many evaluations.

    Args:
        data: the data set.
        name: name of the domain.
        rows: (n,) row numbers.
        device: where the batches are kept.
        batch_size: samples in a batch; the last one may be smaller. Default: `LARGEST`; on a CPU fewer large ones.
        limit: use only this number of rows, the first: a random sample if the rows were shuffled by `domains.split`.
    """
    domain, wanted = data.domain(name), torch.tensor(rows[:limit])
    images, chunks = domain.images, []
    size = batch_size or _fitting(images.shape[1:], device)
    for chunk in torch.split(wanted, size) if len(wanted) else ():
        own = domain.images[chunk].to(device) if isinstance(images, Tensor) else images.to(device)
        chunks.append((own, chunk, domain.labels[chunk].to(device)))
    batches = _BatchesByRows(data, chunks)
    made_once = 4 * len(wanted) * int(np.prod(images.shape[1:])) <= KEPT
    return list(batches) if made_once else batches


def _fitting(shape: Sequence[int], device: torch.device) -> int:
    """Return how many samples of a shape are evaluated at once; on a CPU the caches should hold their activations."""
    if device.type != "cpu":
        return LARGEST
    return min(LARGEST, max(FEWEST, CACHED // math.prod(shape[-2:])))
