"""Batches of nested tensors, with samples along dimension 0: read into memory, compared, cut to another size."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatlab.arguments import whole
from flatlab.errors import UserError
from flatlab.tensors.structures import leaves, mapped

Pairs = Iterable[tuple[Any, Any]]
Data = Pairs | Iterable[Mapping[str, Any]]
MOST_SPREAD = 8  # batches from which a few samples are taken


class Batch(NamedTuple):
    """Samples that go through a model together; inputs and targets are any nests of tensors."""

    inputs: Any
    targets: Any
    size: int


def read_strata(sources: Mapping[Any, Data], device: torch.device, *, check: bool = True) -> list[list[Batch]]:
    """Read all batches of each stratum into memory, as `read` does, also if their loaders reuse one buffer."""
    kept = [read(name, source, device, check=check) for name, source in sources.items()]
    if len(kept) > 1 and _overlap([batch for batches in kept for batch in batches]):
        return [read(name, source, device, check=check, copy=True) for name, source in sources.items()]
    return kept


def read(name: object, source: Data, device: torch.device, *, check: bool = True, copy: bool = False) -> list[Batch]:
    """Read all batches of a stratum into memory; with ``check`` a second time, to compare them.

    Raises:
        UserError: if the data cannot be read twice, are empty, shuffled or augmented, or not pairs of tensors.
    """
    if isinstance(source, Iterator):
        raise UserError(
            f"The data of {name!r} are a one-shot iterator, but must be read twice: pass a list or a DataLoader."
        )
    batches = [] if copy else list(_pairs(source, device))
    if copy or _overlap(batches):  # of a loader that reuses one buffer, every batch would be the last one
        batches = [_map_batch(torch.clone, batch) for batch in _pairs(source, device)]
    if not batches:
        raise UserError(f"The data of {name!r} hold no sample: pass at least one batch that is not empty.")
    if check:
        for first, second in zip_longest(batches, _pairs(source, device)):
            if first is None or second is None or not near(first[:2], second[:2]):
                raise UserError(
                    f"Two passes over the data of {name!r} differ: pass a loader that neither shuffles nor"
                    " augments (shuffle=False, the test transform) and can be read again."
                )
    return batches


def _overlap(batches: list[Batch]) -> bool:
    """Whether inputs or targets of two batches share memory."""
    spans = []
    for index, batch in enumerate(batches):
        for leaf in tensors(batch[:2]):
            if leaf.layout == torch.strided and leaf.numel():
                reach = sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
                spans.append((leaf.data_ptr(), leaf.data_ptr() + (reach + 1) * leaf.element_size(), index))
    furthest, owner = 0, -1
    for start, end, index in sorted(spans):
        if start < furthest and owner != index:
            return True
        furthest, owner = max((furthest, owner), (end, index))
    return False


def recut(batches: list[Batch], batch_size: int | None) -> list[Batch]:
    """Cut the same samples into batches of another size."""
    if batch_size is None:
        return batches
    whole("batch_size", batch_size)
    try:
        return cut(join(batches), batch_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"batch_size needs batches of equal shapes and structures, got others: leave it out ({error})."
        ) from error


def join(batches: Sequence[Batch]) -> Batch:
    """Return batches of one structure and of equal shapes as one."""
    inputs, targets = concatenate([batch[:2] for batch in batches])
    return Batch(inputs, targets, sum(batch.size for batch in batches))


def cut(batch: Batch, length: int) -> list[Batch]:
    """Cut a batch into views of `length` samples; the last may be shorter."""
    pieces = []
    for start in range(0, batch.size, length):
        stop = min(start + length, batch.size)
        pieces.append(span(batch, start, stop))
    return pieces


def pick(batch: Batch, rows: Tensor) -> Batch:
    """Return some samples of a batch, in the same memory format."""
    if isinstance(batch.inputs, Tensor) and isinstance(batch.targets, Tensor):  # as in `part`
        where = rows.to(batch.inputs.device)
        return Batch(batch.inputs[where], batch.targets[where], len(rows))
    return _map_batch(lambda leaf: leaf[rows.to(leaf.device)], batch)._replace(size=len(rows))


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return about `count` samples, at least one, spread evenly over the batches and over the rows of each."""
    number = min(count, len(batches), MOST_SPREAD)
    chosen = [batches[index * len(batches) // number] for index in range(number)]
    rows = [count * (index + 1) // number - count * index // number for index in range(number)]
    counts = [min(row, batch.size) for row, batch in zip(rows, chosen, strict=True)]
    return [pick(batch, torch.arange(n) * batch.size // n) for batch, n in zip(chosen, counts, strict=True)]


def converted(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch whose real numbers have this dtype; integers stay."""
    return _map_batch(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)


def part(nest: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` of a nest, as views."""
    if isinstance(nest, Tensor):  # mapped on a single leaf costs ten times as much as the slice
        return nest[start:stop]
    return mapped(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, nest)


def span(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples `start` to `stop` of a batch, as views."""
    return Batch(part(batch.inputs, start, stop), part(batch.targets, start, stop), stop - start)


def concatenate(nests: list[Any]) -> Any:
    """Join nests of one structure along the sample axis."""
    return mapped(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *nests)


def tensors(nest: Any) -> list[Tensor]:
    """Return the tensors of a nest, in a fixed order."""
    return [leaf for leaf in leaves(nest) if isinstance(leaf, Tensor)]


def near(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Whether two nests contain the same tensors, up to `tolerance` times the largest entry; NaN equals NaN."""
    pairs = list(zip_longest(tensors(first), tensors(second)))
    if any(a is None or b is None or a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    return all(_near(a, b, tolerance) for a, b in pairs)


def distance(first: Any, second: Any) -> float:
    """Return the largest difference of two nests of equal shapes, relative to the largest entry.

    Integers that differ count as 1; entries that are NaN in both, or the same infinity, count as equal.
    """
    return max((_distance(a, b) for a, b in zip(tensors(first), tensors(second), strict=True)), default=0.0)


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Whether two lists of batches contain the same samples, whatever the sizes of the batches."""
    if sum(batch.size for batch in first) != sum(batch.size for batch in second):
        return False
    if [batch.size for batch in first] != [batch.size for batch in second]:
        longest = max(batch.size for batch in first)
        first, second = recut(first, longest), recut(second, longest)
    return all(near(a[:2], b[:2]) for a, b in zip(first, second, strict=True))


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return torch.equal(a, b) or _distance(a, b) <= tolerance


def _distance(a: Tensor, b: Tensor) -> float:
    differs = ~((a == b) | ((a != a) & (b != b)))
    if not differs.any():
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return 1.0
    off = float((a - b)[differs].abs().max().nan_to_num(torch.inf))
    return off / max(float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()), torch.finfo(a.dtype).tiny)


def _pairs(source: Data, device: torch.device) -> Iterator[Batch]:
    for pair in source:
        if isinstance(pair, Mapping) and isinstance(pair.get("labels"), Tensor):
            pair = pair, pair["labels"]  # the form of transformers: encoder-decoders need the labels as an input
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"Each batch must be a pair (inputs, targets), got {_described(pair)}.")
        found = [leaf for leaf in leaves(list(pair)) if leaf is not None]
        sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in found}
        if len(sizes) != 1 or not sizes.isdisjoint({None, ()}):
            shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in found]
            raise UserError(
                "Inputs and targets must be nests of tensors that share dimension 0, the sample axis, got shapes"
                f" {shapes}."
            )
        if size := len(found[0]):
            yield _map_batch(lambda leaf: leaf.detach().to(device), Batch(pair[0], pair[1], size))


def _described(batch: Any) -> str:
    """Describe a batch that is not a pair, and state how to make it one."""
    if isinstance(batch, tuple | list) and len(batch) > 2:
        rest = ", ".join("_" * (len(batch) - 2))
        return f"{len(batch)} items: pass [(inputs, targets) for inputs, targets, {rest} in loader]"
    if isinstance(batch, Mapping):
        kind, pairs = type(batch).__name__, "pass pairs of the model's and the loss's arguments"
        if "labels" in batch:
            return f"a {kind} whose 'labels' are a {type(batch['labels']).__name__}: make them a tensor, or {pairs}"
        return (
            f"a {kind} with {', '.join(map(repr, batch))}, but without 'labels': add the targets as batch[\"labels\"],"
            f" or {pairs}, such as [(batch, targets) for batch, targets in zip(loader, labels)]"
        )
    return f"a {type(batch).__name__}"


def _map_batch(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    inputs, targets = mapped(lambda leaf: None if leaf is None else change(leaf), batch[:2])
    return Batch(inputs, targets, batch.size)
