"""Batches of nested tensors, with samples along dimension 0: read into memory, compared, cut anew."""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from flatlab.arguments import whole
from flatlab.errors import UserError

Data = Iterable[tuple[Any, Any]]


class Batch(NamedTuple):
    """Samples that go through a model together; inputs and targets are any nests of tensors."""

    inputs: Any
    targets: Any
    size: int


def read(name: object, source: Data, device: torch.device, *, check: bool = True) -> list[Batch]:
    """Read all batches of a stratum into memory; with ``check`` once more, to see whether they are the same.

    Raises:
        UserError: if the data cannot be read twice, are empty, shuffled or augmented, or not pairs of tensors.
    """
    if isinstance(source, Iterator):
        raise UserError(
            f"The data of {name!r} are a one-shot iterator, but must be read twice: hand in a list or a DataLoader."
        )
    batches = list(_pairs(source, device))
    starts = [leaf.data_ptr() for batch in batches for leaf in tensors(batch.inputs)]
    if len(set(starts)) < len(starts):  # A loader that refills one buffer would leave us its last batch many times.
        batches = [_map_batch(torch.clone, batch) for batch in _pairs(source, device)]
    if not batches:
        raise UserError(f"The data of {name!r} hold no sample: hand in at least one batch that is not empty.")
    if check:
        for first, second in zip_longest(batches, _pairs(source, device)):
            if first is None or second is None or not near(first[:2], second[:2]):
                raise UserError(
                    f"Two passes over the data of {name!r} differ: hand in a loader that neither shuffles nor"
                    " augments (shuffle=False, the test transform) and can be read again."
                )
    return batches


def recut(batches: list[Batch], batch_size: int | None) -> list[Batch]:
    """Cut the same samples into batches of another size."""
    if batch_size is None:
        return batches
    whole("batch_size", batch_size)
    try:
        inputs, targets = concatenate([batch[:2] for batch in batches])
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The batches cannot be cut anew, since their shapes or structures differ: leave batch_size out ({error})."
        ) from error
    return cut(Batch(inputs, targets, sum(batch.size for batch in batches)), batch_size)


def cut(batch: Batch, length: int) -> list[Batch]:
    """Cut a batch into views of `length` samples; the last may be shorter."""
    pieces = []
    for start in range(0, batch.size, length):
        stop = min(start + length, batch.size)
        pieces.append(span(batch, start, stop))
    return pieces


def pick(batch: Batch, rows: Tensor) -> Batch:
    """Return some samples of a batch, in the memory format that they lie in."""
    if isinstance(batch.inputs, Tensor) and isinstance(batch.targets, Tensor):  # as in `part`
        where = rows.to(batch.inputs.device)
        return Batch(batch.inputs[where], batch.targets[where], len(rows))
    return _map_batch(lambda leaf: leaf[rows.to(leaf.device)], batch)._replace(size=len(rows))


def part(nest: Any, start: int, stop: int) -> Any:
    """Return samples `start` to `stop` of a nest, as views."""
    if isinstance(nest, Tensor):  # a walk through a tree of one leaf costs ten times as much as the slice
        return nest[start:stop]
    return tree_map(lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, nest)


def span(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples `start` to `stop` of a batch, as views."""
    return Batch(part(batch.inputs, start, stop), part(batch.targets, start, stop), stop - start)


def concatenate(nests: list[Any]) -> Any:
    """Join nests of one structure along the sample axis."""
    return tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *nests)


def tensors(nest: Any) -> list[Tensor]:
    """Return the tensors of a nest, in a fixed order."""
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]


def near(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Say whether two nests hold the same tensors, up to `tolerance` times the largest entry; NaN equals NaN."""
    pairs = list(zip_longest(tensors(first), tensors(second)))
    if any(a is None or b is None or a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    return all(_near(a, b, tolerance) for a, b in pairs)


def same(first: list[Batch], second: list[Batch]) -> bool:
    """Say whether two lists of batches hold the same samples, however they are cut."""
    if sum(batch.size for batch in first) != sum(batch.size for batch in second):
        return False
    if [batch.size for batch in first] != [batch.size for batch in second]:
        longest = max(batch.size for batch in first)
        first, second = recut(first, longest), recut(second, longest)
    return all(near(a[:2], b[:2]) for a, b in zip(first, second, strict=True))


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if torch.equal(a, b):
        return True
    same = (a == b) | ((a != a) & (b != b))
    if tolerance == 0.0 or not a.is_floating_point():
        return bool(same.all())
    slack = tolerance * float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return bool((same | ((a - b).abs() <= slack)).all())


def _pairs(source: Data, device: torch.device) -> Iterator[Batch]:
    for pair in source:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(f"Each batch must be a pair (inputs, targets), but a {type(pair).__name__} came.")
        leaves = [leaf for leaf in tree_leaves(list(pair)) if leaf is not None]
        sizes = {leaf.shape[:1] if isinstance(leaf, Tensor) else None for leaf in leaves}
        if len(sizes) != 1 or not sizes.isdisjoint({None, ()}):
            shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
            raise UserError(
                "Inputs and targets must be nests of tensors that share dimension 0, the sample axis, but"
                f" {shapes} came."
            )
        if size := len(leaves[0]):
            yield _map_batch(lambda leaf: leaf.detach().to(device), Batch(pair[0], pair[1], size))


def _map_batch(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    inputs, targets = tree_map(lambda leaf: None if leaf is None else change(leaf), batch[:2])
    return Batch(inputs, targets, batch.size)
