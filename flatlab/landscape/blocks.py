"""Blocks: a fixed, shuffled partition of a landscape's samples, in which each block has its share of each stratum.

Evaluating a direction on one block costs a part of a pass over the data. The mean over all blocks is the mean over
all samples, whatever the sizes: a block's total of stratum s is scaled by (number of blocks) / (size of s). A
stratum of fewer samples than there are blocks has one in each: a sample in n blocks counts 1 / n in each of them.
Otherwise most blocks would lack a part of the loss, and a few of them would not show its variance.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._pytree import tree_structure

from flatlab.arguments import FloatArray, whole
from flatlab.errors import UserError
from flatlab.tensors.nested import Batch, join, pick, tensors

Indices = npt.NDArray[np.int64]
JOINED = 2**28  # maximum bytes of all samples for which a second copy of them is kept, as one batch


class Part(NamedTuple):
    """Samples `start` to `stop` of a block, whose total loss is added to entry `row` of an evaluation."""

    row: int
    start: int
    stop: int
    scale: float


@dataclass(frozen=True)
class Block:
    """Some samples of each stratum, by number: no second copy of the data is kept."""

    rows: Indices  # numbers among the samples of all strata, ascending
    parts: tuple[Part, ...]
    width: int  # number of entries of an evaluation: one for each stratum

    @property
    def size(self) -> int:
        """The number of samples."""
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
        """Return shares (K, width) from totals (K, parts) or losses (K, samples): their mean is the stratum mean."""
        if totals.shape[1] == self.size:
            totals = np.add.reduceat(totals, [part.start for part in self.parts], axis=1)
        shares = np.zeros((len(totals), self.width))
        for column, part in enumerate(self.parts):
            shares[:, part.row] += totals[:, column] * part.scale
        return shares


class Gathered(NamedTuple):
    """A block's samples, ready to be evaluated at many points."""

    batch: Batch
    block: Block
    targets: list[Batch]  # of each part, cut once: a loss takes no inputs


class Samples:
    """The samples of a landscape by number, stratum after stratum."""

    def __init__(self, batches: Sequence[Sequence[Batch]]) -> None:
        each = [batch for stratum in batches for batch in stratum]
        self.alike = len(each) == 1 or of_one_form(each)
        # Picking a few samples from many batches takes as long as evaluating a small network.
        self._batches = [join(each)] if len(each) > 1 and _bytes(each) <= JOINED and self.alike else each
        self._ends = np.cumsum([batch.size for batch in self._batches])

    def pick(self, rows: Indices) -> Batch:
        """Return some samples as one batch.

        Args:
            rows: their numbers, ascending.

        Raises:
            UserError: if samples differ in shape.
        """
        if len(self._batches) == 1:
            return pick(self._batches[0], torch.from_numpy(rows))
        homes, starts = np.searchsorted(self._ends, rows, side="right"), np.append(0, self._ends)
        picked = [pick(self._batches[h], torch.from_numpy(rows[homes == h] - starts[h])) for h in np.unique(homes)]
        try:
            return join(picked)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"Samples of different shapes cannot share a block; give num_samples, which uses whole batches: {error}"
            ) from error


class Partition:
    """Blocks of about equal size, cut on access."""

    def __init__(
        self,
        sizes: Sequence[int],
        block_size: int,
        *,
        generator: torch.Generator,
        weights: Sequence[float] | None = None,
    ) -> None:
        """Shuffle the samples within each stratum.

        Args:
            sizes: samples of each stratum.
            block_size: samples of a block; sizes, and shares of each stratum, differ by at most one. Blocks are larger
                with small strata: they have a sample of each.
            generator: of the shuffle.
            weights: sum of the samples' weights in each stratum; None: their number.
        """
        self._weights = sizes if weights is None else weights
        self._count = max(1, round(sum(sizes) / whole("block_size", block_size)))
        self._orders = [torch.randperm(size, generator=generator).numpy() for size in sizes]
        self._starts = np.cumsum([0, *sizes])
        self._seats: Indices = torch.randperm(self._count, generator=generator).numpy()  # which blocks get one more

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self._count

    def __iter__(self) -> Iterator[Block]:
        """Cut one block after the other."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Block:
        """Cut a block."""
        rows, parts, start = [], [], 0
        for stratum, order in enumerate(self._orders):
            place = int(self._places(stratum)[index])
            share = order[place :: self._count] if place < len(order) else order[[place % len(order)]]
            uses = (self._count - 1 - place % len(order)) // len(order) + 1  # number of blocks with this sample
            rows.append(self._starts[stratum] + np.sort(share))
            parts.append(Part(stratum, start, start + len(share), self._count / (self._weights[stratum] * uses)))
            start += len(share)
        return Block(np.concatenate(rows), tuple(parts), len(parts))

    @property
    def sizes(self) -> Indices:
        """The number of samples of each block."""
        shares = [-(-(len(o) - self._places(s)) // self._count) for s, o in enumerate(self._orders)]
        return np.asarray(np.maximum(shares, 1).sum(axis=0))

    def _places(self, stratum: int) -> Indices:
        # Each stratum begins at the block where the last one ended, so that sizes differ by at most one.
        return np.asarray((self._seats - self._starts[stratum]) % self._count)


def _bytes(batches: Sequence[Batch]) -> int:
    return sum(leaf.numel() * leaf.element_size() for batch in batches for leaf in tensors(batch[:2]))


def of_one_form(batches: Sequence[Batch]) -> bool:
    """Return whether samples are of one structure, shape and dtype."""
    forms = {
        (str(tree_structure(batch[:2])), *((leaf.shape[1:], leaf.dtype) for leaf in tensors(batch[:2])))
        for batch in batches
    }
    return len(forms) == 1
