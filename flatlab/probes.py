"""Probes that find out whether a loss is a function of the parameters alone, before anyone believes its value."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from flatlab.derivatives import is_staircase
from flatlab.errors import UserError
from flatlab.nests import Batch, concatenate, cut, near, tensors

Total = Callable[[Any, Batch], Tensor]
"""The sum of the losses over a batch, from the outputs: a float64 scalar."""

_PIECES = 64  # a batch is cut so often, at most, to see whether its mean loss is the mean over its samples
_GPU_NOISE = 1e-4  # atomics reorder sums from run to run
_GPU_MIXING = 1e-2  # another batch size may choose another TF32 kernel; mixing through BatchNorm moves 0.1 and more


def alike(named: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Return the parameters as a list; refuse those that one flat vector cannot hold."""
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1 or not all(p.is_floating_point() for p in named.values()):
        came = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise UserError(f"The parameters must be floats of one dtype on one device, but are {came}: use model.to().")
    return list(named.values())


def refuse_parametrized(model: nn.Module, moved: Mapping[str, nn.Parameter]) -> None:
    """Refuse to move what a rounded weight is rounded by, such as a step size: a tiny step there is a huge one.

    The parameters of a smooth parametrization (weight_norm, orthogonal, low rank) are weights like others.
    """
    for name in moved:
        layer, _, rest = name.partition(".parametrizations.")
        tensor, _, rest = rest.partition(".")
        if not rest or re.fullmatch(r"original\d*", rest):
            continue
        parametrized = model.get_submodule(f"{layer}.parametrizations.{tensor}")
        if isinstance(parametrized, ParametrizationList) and is_staircase(parametrized):
            raise UserError(
                f"{name!r} belongs to the parametrization of {layer!r}, and moving it means something else than moving "
                "weights: bake(model) first, or hold it still with requires_grad_(False)."
            )


def refuse_training(model: nn.Module) -> None:
    """Refuse a model of which any part is in training mode: dropout is on, BatchNorm looks at the batch."""
    for name, module in model.named_modules():
        if module.training:
            raise UserError(
                f"The model must be in eval mode, but {name or type(model).__name__!r} is in training mode:"
                " call model.eval() first."
            )


def versions(model: nn.Module, moved: Iterable[Tensor]) -> dict[str, tuple[int, int]]:
    """Return what changes whenever a buffer, or a parameter that is not moved by us, is written or replaced."""
    ours = {id(tensor) for tensor in moved}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: (id(t), 0 if t.is_inference() else t._version) for n, t in named if id(t) not in ours}


def probe_model(model: Callable[[Any], Any], batch: Batch, total: Total) -> None:
    """Refuse a model that draws at random, that loses the sample axis, or in which samples mix."""
    outputs, again = model(batch.inputs), model(batch.inputs)
    sizes = [tuple(leaf.shape[:1]) for leaf in tensors(outputs)]
    if set(sizes) != {(batch.size,)}:
        raise UserError(
            f"The model must return tensors with the sample axis ({batch.size} here) as dimension 0, but sizes {sizes}"
            " came: return something per sample, and reduce it in the loss."
        )
    cpu = all(leaf.device.type == "cpu" for leaf in tensors(outputs))
    losses = [total(outputs, batch), total(outputs, batch), total(again, batch)]
    if not near([outputs, *losses[:1] * 2], [again, *losses[1:]], 0.0 if cpu else _GPU_NOISE):
        raise UserError(
            "The same batch gives two different outputs or losses, but a landscape needs a fixed function:"
            " switch off what draws at random (dropout, noise, augmentation inside the model)."
        )
    halves = concatenate([model(piece.inputs) for piece in cut(batch, -(-batch.size // 2))])
    eps = max((torch.finfo(leaf.dtype).eps for leaf in tensors(outputs) if leaf.is_floating_point()), default=0.0)
    if not near(outputs, halves, max(eps**0.5, 0.0 if cpu else _GPU_MIXING)):
        raise UserError(
            "The outputs of a batch differ from those of its two halves, so samples mix in the model:"
            " use statistics that do not come from the batch (BatchNorm with track_running_stats=True)."
        )


def probe_mean(model: Callable[[Any], Any], batch: Batch, total: Total) -> None:
    """Refuse a batch loss that is not the mean over the samples; costs one forward and calls of the loss."""
    outputs = model(batch.inputs)
    # Small pieces, not halves: ignored targets that lie evenly in the batch would go unseen.
    length = max(1 if batch.size < 4 else 2, -(-batch.size // _PIECES))
    pieces = cut(Batch(outputs, batch.targets, batch.size), length)
    parts = torch.stack([total(piece.inputs, piece) for piece in pieces])
    eps = max((torch.finfo(leaf.dtype).eps for leaf in tensors(outputs) if leaf.is_floating_point()), default=1e-7)
    if not (total(outputs, batch) - parts.sum()).abs() <= 32 * eps * parts.abs().sum():
        raise UserError(
            "The mean loss of a batch is not the mean over its samples (class weights, ignore_index, a sum):"
            " hand in per-sample losses (reduction='none')."
        )
