"""Checks of a loss's value: the same in each pass, and the same for joined and for cut batches."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from flatlab.errors import UserError, count_of
from flatlab.landscape.checks import Total
from flatlab.landscape.failures import model_explained
from flatlab.seeds import generator
from flatlab.tensors.nested import Batch, concatenate, cut, distance, near, pick, spread, tensors
from flatlab.tensors.structures import mapped

Forward = Callable[[Any], Any]
Weigh = Callable[[Any, Batch], Tensor | None]
"""The weight of a batch, from the outputs; None if it is its size."""
Singly = Callable[[Any, Any], Tensor | None]
"""From outputs and targets to the loss of each sample (n,) in one call, if the loss is one that is known."""

SURE, TENTH = 10_000, 10  # samples of a stratum that are all evaluated twice; of more, one batch in up to ten is
_PIECES = 64  # into which a batch is cut, at most, to test whether its mean loss is the mean over its samples
_JOINED = 8  # batches of one sample that are joined
_ACROSS = 64  # samples of different batches whose losses are joined
_GPU_NOISE = 1e-4  # atomics reorder sums from run to run
_GPU_MIXING = 1e-2  # another batch size may choose another kernel; mixing through BatchNorm moves 0.1 and more


def check_fixed(model: Forward, batch: Batch, total: Total) -> None:
    """Refuse a model or a loss that draws at random; costs two passes over the batch."""
    outputs, again = _run(model, batch), _run(model, batch)
    losses = [total(outputs, batch), total(outputs, batch), total(again, batch)]
    allowed = 0.0 if _on_cpu(outputs) else _GPU_NOISE
    if near([outputs, *losses[:1] * 2], [again, *losses[1:]], allowed):
        return
    off = max(distance(outputs, again), distance(losses[:1] * 2, losses[1:]))
    raise UserError(
        f"The same batch gives two different outputs or losses, by {off:.2g} of the largest, but a landscape needs a"
        " fixed function: switch off random parts (dropout, noise, augmentation inside the model)."
    )


def check_values(
    model: Forward, batches: Sequence[Batch], total: Total, weigh: Weigh, singly: Singly
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the losses of a stratum and its weight; refuse one that depends on how samples are joined.

    Each sample is evaluated twice: in its batch, and in a half of it that separates neighbours, or joined with others
    of its shape if it is alone in its batch (samples of different shapes are never joined). Of more than 10,000 samples
    only some batches are evaluated again, evenly spread, and one of each shape: a model mixes samples in all of them,
    and a second pass would take as long as a measurement. The loss of a batch is
    compared with those of small pieces of it, and the loss of samples from several batches with those of their parts:
    batches of one class or one sample have the same mean whatever the weights. `singly` gives the losses of samples in
    one call, of losses that it knows: as pieces they take as many calls.
    """
    sums, weights, across = list[Tensor](), list[Tensor | None](), list[Batch]()
    every = max(1, len(batches) // (_ACROSS // 2))
    groups = list(_groups(batches))
    twice = _twice(groups)
    for number, group in enumerate(groups):
        outputs = [_run(model, batch) for batch in group]
        if number in twice:
            _refuse_mixing(model, group, outputs, total)
        for each, batch in zip(outputs, group, strict=True):
            whole = Batch(each, batch.targets, batch.size)
            sums.append(_refuse_weighing(whole, total, "a batch", known=singly(each, batch.targets)))
            weights.append(weigh(each, batch))
            across += spread([whole], 2) if len(sums) % every == 0 else []
    if len(across) > 1 and (joined := _joined([batch[:2] for batch in across])) is not None:
        whole = Batch(joined[0], joined[1], sum(batch.size for batch in across))
        _refuse_weighing(whole, total, "samples of several batches", pieces=across)
    found = [each for each in weights if each is not None]
    return torch.stack(sums).sum(0), torch.stack(found).sum(0) if found else None


def refuse_mixing_across(model: Forward, batches: Sequence[Batch], total: Total) -> None:
    """Refuse a model in which the lone samples of several strata change each other's outputs: blocks join them."""
    for group in _groups(batches):
        if len(group) > 1:
            _refuse_mixing(model, group, [_run(model, batch) for batch in group], total)


def _twice(groups: Sequence[Sequence[Batch]]) -> set[int]:
    """Return the numbers of the groups that are evaluated a second time."""
    every = max(1, min(TENTH, sum(batch.size for group in groups for batch in group) // SURE))
    first = {tuple(_shapes(groups[number][0][:2])): number for number in reversed(range(len(groups)))}
    return {*range(0, len(groups), every), *first.values()}


def _groups(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Yield batches, those of one sample in groups of equal shapes: others are never joined."""
    singles: dict[tuple[tuple[int, ...], ...], list[Batch]] = {}
    for batch in batches:
        if batch.size > 1:
            yield [batch]
            continue
        key = tuple(_shapes(batch[:2]))
        singles.setdefault(key, []).append(batch)
        if len(singles[key]) == _JOINED:
            yield singles.pop(key)
    yield from singles.values()


def _run(model: Forward, batch: Batch) -> Any:
    with model_explained(model, batch.inputs, batch.size):
        outputs = model(batch.inputs)
    sizes = [tuple(leaf.shape) for leaf in tensors(outputs)]
    if {shape[:1] for shape in sizes} != {(batch.size,)}:
        raise UserError(
            f"The model must return tensors with the sample axis ({batch.size} here) as dimension 0, got shapes"
            f" {sizes}: return something per sample, and reduce it in the loss (squeeze(1), not squeeze())."
        )
    return outputs


def _on_cpu(outputs: Any) -> bool:
    return all(leaf.device.type == "cpu" for leaf in tensors(outputs))


def _eps(outputs: Any) -> float:
    return max((torch.finfo(leaf.dtype).eps for leaf in tensors(outputs) if leaf.is_floating_point()), default=1e-7)


def _refuse_mixing(model: Forward, group: list[Batch], outputs: list[Any], total: Total) -> None:
    """Refuse a model in which the samples of a batch change each other's outputs."""
    other, order = _otherwise(group)
    if not other:
        return
    try:
        again = [_run(model, batch) for batch in other]
    except UserError as error:
        if not isinstance(why := error.__cause__, RuntimeError):
            raise
        raise UserError(
            f"The model takes {count_of(group[0].size, 'sample')} at a time but not {other[0].size} ({why}): its"
            " outputs must not depend on which samples share a batch."
        ) from why
    first, second = _joined(outputs), _joined(again)
    if order is not None:
        first = mapped(lambda leaf: leaf[order.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, first)
    allowed = max(_eps(outputs) ** 0.5, 0.0 if _on_cpu(outputs) else _GPU_MIXING)
    if first is not None and second is not None and _shapes(first) == _shapes(second):
        if (off := distance(first, second)) > allowed:
            raise UserError(
                f"The outputs of a batch differ from those of its two halves by {off:.2g} of the largest, so samples"
                " mix in the model: use statistics that do not depend on the batch (BatchNorm with"
                " track_running_stats=True)."
            )
        return
    one, two = (
        sum(float(total(o, b)) for o, b in zip(runs, parts, strict=True))
        for runs, parts in ((outputs, group), (again, other))
    )
    if not abs(one - two) <= allowed * max(abs(one), abs(two)):
        raise UserError(
            f"The outputs of a batch have shapes {_shapes(outputs)}, those of its parts {_shapes(again)}, and their"
            f" losses sum up to {one:.4g} and {two:.4g}: give the samples one length whatever their batch"
            " (pad_packed_sequence(..., total_length=...)), or use a loss that ignores the padding."
        )


def _otherwise(group: list[Batch]) -> tuple[list[Batch], Tensor | None]:
    """Return the same samples in halves and their order, or joined if they are batches of one; empty if impossible."""
    if len(group) == 1:
        *halves, order = _halves(group[0].size)
        return ([pick(group[0], half) for half in halves], order) if group[0].size > 1 else ([], None)
    joined = _joined([batch[:2] for batch in group])
    return [] if joined is None else [Batch(joined[0], joined[1], len(group))], None


@cache
def _halves(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows with an even and with an odd number of ones in binary, and both.

    They separate rows 2i and 2i + 1, which a model or a loss may compare with each other, but keep the order, by which
    samples may have to be sorted.
    """
    odd = torch.tensor([row.bit_count() % 2 == 1 for row in range(size)])
    even, rest = torch.nonzero(~odd).flatten(), torch.nonzero(odd).flatten()
    return even, rest, torch.cat([even, rest])


@cache
def _shuffled(size: int) -> Tensor:
    return torch.randperm(size, generator=generator("landscape", "pieces", size))


def _joined(nests: list[Any]) -> Any:
    """Return nests as one; None if their shapes differ."""
    if len({tuple(shape[1:] for shape in _shapes(nest)) for nest in nests}) > 1:
        return None
    return concatenate(nests)


def _shapes(nest: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tensors(nest)]


def _pieces(whole: Batch) -> list[Batch]:
    """Return small pieces of a batch, given as outputs and targets, in random order, as blocks separate neighbours."""
    # Small pieces, not halves: ignored targets that are spread evenly over the batch would not be detected.
    return cut(pick(whole, _shuffled(whole.size)), max(1 if whole.size < 8 else 2, -(-whole.size // _PIECES)))


def _refuse_weighing(
    whole: Batch, total: Total, what: str, *, pieces: Sequence[Batch] = (), known: Tensor | None = None
) -> Tensor:
    """Return the sum of the losses of outputs and targets; refuse one that is not the sum over pieces, or samples."""
    one = total(whole.inputs, whole)
    if known is None:
        cuts = pieces or _pieces(whole)
        parts, counts = torch.stack([total(piece.inputs, piece) for piece in cuts]), [piece.size for piece in cuts]
    else:
        parts, counts = known.double(), [1] * len(known)
    # Losses that are not finite are not compared here; they are refused elsewhere.
    if not torch.isfinite(one) or (one - parts.sum()).abs() <= 32 * _eps(whole.inputs) * parts.abs().sum():
        return one
    means, mean = parts / parts.new_tensor(counts), float(one) / whole.size
    if shapes := _broadcast(whole, total):
        why = f"outputs {shapes[0]} and targets {shapes[1]} are broadcast against each other: give them one shape"
    elif abs(float(means.sum()) - mean) <= 1e-3 * abs(mean):
        why = "it is a sum: divide it by the number of samples (reduction='mean')"
    else:
        weights = "(targets != -100).sum(1)" if _is_sequence(whole.targets) else "weight[targets]"
        why = (
            "it weighs samples unequally (ignore_index, class weights), or compares them with each other (pairs, ranks:"
            " then there is no mean over samples); in the first case let it return two vectors, each sample's sum"
            f" (reduction='none') and each sample's weight, as {weights}"
        )
    off = float(parts.sum()) / whole.size - mean
    apart = f"over its samples it differs by {off:+.2g}" if isfinite(off) else "of some samples alone it is not finite"
    raise UserError(
        f"The mean loss of {what} is {mean:.4g}, but {apart}, so it is not the mean over its samples; {why}."
    )


def _broadcast(whole: Batch, total: Total) -> list[tuple[int, ...]]:
    """Return the shapes of outputs and targets if the loss is a mean over samples once they have one shape; else []."""
    outputs, targets = whole.inputs, whole.targets
    if not all(isinstance(each, Tensor) and each.is_floating_point() for each in (outputs, targets)):
        return []
    if outputs.shape == targets.shape or outputs.numel() != targets.numel():
        return []
    alike = Batch(outputs, targets.reshape(outputs.shape), whole.size)
    try:
        _refuse_weighing(alike, total, "")
    except (UserError, RuntimeError, IndexError):
        return []
    return _shapes([outputs, targets])


def _is_sequence(targets: Any) -> bool:
    return isinstance(targets, Tensor) and targets.ndim > 1
