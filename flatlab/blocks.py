"""Blocks: a fixed, shuffled partition of a landscape's samples, in which each part holds its share of each stratum.

A direction that sees one block costs a part of a pass over the data. The mean over one visit to each block is the mean
over all samples, whatever the sizes: a block's total of stratum s is scaled by (number of blocks) / (size of s).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from flatlab.errors import UserError
from flatlab.nests import Batch, concatenate, pick, span

Indices = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Part(NamedTuple):
    """Samples `start` to `stop` of a block, whose total loss counts into entry `row` of what a visit returns."""

    row: int
    start: int
    stop: int
    scale: float


@dataclass(frozen=True)
class Block:
    """Some samples of each stratum, as rows of the landscape's batches: no second copy of the data is kept."""

    rows: tuple[tuple[int, int, Indices], ...]  # (stratum, batch, rows of that batch)
    parts: tuple[Part, ...]
    width: int  # entries of what a visit returns: one for each stratum

    @property
    def size(self) -> int:
        """How many samples the block holds."""
        return self.parts[-1].stop

    @property
    def strata(self) -> Indices:
        """The stratum of each sample."""
        return np.repeat([part.row for part in self.parts], [part.stop - part.start for part in self.parts])

    def by_sample(self) -> "Block":
        """Return the same block with an entry for each sample, scaled so that their mean is that of the strata."""
        strata, singles = self.width, []
        for part in self.parts:
            scale = part.scale * self.size / strata
            singles += [Part(i, i, i + 1, scale) for i in range(part.start, part.stop)]
        return replace(self, parts=tuple(singles), width=self.size)

    def weighted(self, by: FloatArray) -> "Block":
        """Return the same block with the parts of each stratum scaled by a factor (S,)."""
        return replace(self, parts=tuple(p._replace(scale=p.scale * float(by[p.row])) for p in self.parts))

    def shares(self, totals: FloatArray) -> FloatArray:
        """Return shares (K, width) from totals (K, parts): over a partition, their mean is the stratum mean."""
        shares = np.zeros((len(totals), self.width))
        for column, part in enumerate(self.parts):
            shares[:, part.row] += totals[:, column] * part.scale
        return shares

    def gather(self, batches: Sequence[Sequence[Batch]]) -> Batch:
        """Return the samples as one batch, stratum after stratum.

        Args:
            batches: of each stratum of the landscape.

        Raises:
            UserError: where samples differ in shape.
        """
        picked = [pick(batches[stratum][batch], torch.from_numpy(rows)) for stratum, batch, rows in self.rows]
        try:
            inputs, targets = concatenate([batch[:2] for batch in picked])
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"Samples of different shapes cannot share a block; give num_samples, which uses whole batches: {error}"
            ) from error
        return Batch(inputs, targets, self.size)

    def by_stratum(self, batches: Sequence[Sequence[Batch]]) -> dict[int, list[Batch]]:
        """Return the samples as batches of each stratum that the block holds some of."""
        whole, found = self.gather(batches), dict[int, list[Batch]]()
        for part in self.parts:
            found.setdefault(part.row, []).append(span(whole, part.start, part.stop))
        return found


class Gathered(NamedTuple):
    """A block's samples, ready to be evaluated at many points."""

    batch: Batch
    block: Block
    targets: list[Batch]  # of each part, cut once: a loss knows no inputs


def partition(batches: Sequence[Sequence[Batch]], block_size: int, *, generator: torch.Generator) -> list[Block]:
    """Cut the samples into blocks of about `block_size`, by a seeded shuffle within each stratum.

    Args:
        batches: of each stratum.
        block_size: samples of a block; their sizes, and their shares of each stratum, differ by one at most.
        generator: of the shuffle.
    """
    sizes = [sum(batch.size for batch in stratum) for stratum in batches]
    count = max(1, round(sum(sizes) / block_size))
    homes = [_homes(stratum) for stratum in batches]
    orders = [torch.randperm(size, generator=generator).numpy() for size in sizes]
    dealt = np.cumsum([0, *sizes])
    # Each stratum is dealt on from where the last one ended, so that no block is empty; who gets one more is drawn.
    return [
        _block(
            [np.sort(o[(seat - d) % count :: count]) for o, d in zip(orders, dealt, strict=False)], homes, sizes, count
        )
        for seat in torch.randperm(count, generator=generator).tolist()
    ]


def _homes(stratum: Sequence[Batch]) -> Indices:
    """Return (batch, row) of each sample of a stratum."""
    sizes = [batch.size for batch in stratum]
    return np.stack([np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])], 1)


def _block(shares: Sequence[Indices], homes: Sequence[Indices], sizes: Sequence[int], count: int) -> Block:
    rows, parts, start = [], [], 0
    for stratum, share in enumerate(shares):
        if not len(share):
            continue
        home = homes[stratum][share]
        rows += [(stratum, int(batch), home[home[:, 0] == batch, 1]) for batch in np.unique(home[:, 0])]
        parts.append(Part(stratum, start, start + len(share), count / sizes[stratum]))
        start += len(share)
    return Block(tuple(rows), tuple(parts), len(shares))
