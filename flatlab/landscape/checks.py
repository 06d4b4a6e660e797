"""Checks, without calling the model, that its loss is a function of the parameters alone."""

import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakIdKeyDictionary

from flatlab.derivatives.autograd import is_staircase
from flatlab.errors import UserError, count_of
from flatlab.tensors.flat import flatten
from flatlab.tensors.nested import Batch, tensors

Total = Callable[[Any, Batch], Tensor]
"""The sum of the losses over a batch, from the outputs: a float64 scalar."""
Versions = dict[str, tuple[int, int]]
"""By name of a tensor: its identity, and the number of writes to it."""
_UNDONE: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
"""Writes to a tensor that a landscape has undone, bit by bit: to others the tensor has not changed."""


def alike(named: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Return the parameters as a list; refuse those that do not fit into one flat vector."""
    if name := next((name for name, p in named.items() if p.is_complex()), ""):
        raise UserError(
            f"The parameters must be real, but {name!r} is complex: exclude it with requires_grad_(False), or store"
            " it as pairs of real numbers (torch.view_as_real) and join them in forward (torch.view_as_complex)."
        )
    if any(p.device.type == "mps" for p in named.values()):
        raise UserError("The model must be on a device with float64, for exact sums, but is on mps: call model.cpu().")
    kinds = {(p.dtype, p.device) for p in named.values()}
    if len(kinds) > 1 or not all(p.is_floating_point() for p in named.values()):
        got = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise UserError(f"The parameters must be floats of one dtype on one device, got {got}: use model.to(dtype).")
    return list(named.values())


def refuse_parametrized(model: nn.Module, moved: Mapping[str, nn.Parameter]) -> None:
    """Refuse to move the parameters of a rounding, such as a step size, in which a small step changes all weights.

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
                f"{name!r} belongs to the parametrization of {layer!r}, and moving it is not the same as moving "
                "weights: bake(model) first, or exclude it with requires_grad_(False)."
            )


def refuse_rewriting(model: nn.Module) -> None:
    """Refuse layers that write into their own weights whenever they are called."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise UserError(
                f"{name!r} has max_norm={module.max_norm}, so each forward pass rewrites its weights, but a landscape"
                " needs a fixed function: shorten the rows once (torch.renorm), and set max_norm to None."
            )


def refuse_training(model: nn.Module) -> None:
    """Refuse a model of which any part is in training mode, with dropout or batch statistics."""
    for name, module in model.named_modules():
        if module.training:
            raise UserError(
                f"The model must be in eval mode, but {name or type(model).__name__!r} is in training mode:"
                " call model.eval() first."
            )


def refuse_surroundings(device: torch.device) -> None:
    """Refuse contexts of torch that change what a loss or its derivatives are."""
    if torch.is_inference_mode_enabled():
        raise UserError("A landscape needs derivatives, but torch.inference_mode is active: leave that context.")
    if torch.is_autocast_enabled(device.type):
        raise UserError(
            "torch.autocast is active around the landscape; it keeps converted copies of the weights and does not"
            " notice that these are moved: leave that context, and use autocast inside the model's forward."
        )


def stored_quantized(model: nn.Module) -> str:
    """Return which weights cannot vary since a library stores them in another format, as a sentence; empty if none."""

    def real(tensor: Tensor) -> bool:
        return tensor.is_floating_point() or tensor.is_complex()

    named = [*model.named_parameters()]
    found = [(name, p) for name, p in named if type(p).__module__.startswith("torchao") or not real(p)]
    if not found:
        return ""
    return (
        f"{count_of(sum(each.numel() for _, each in found), 'weight')} ({found[0][0]}"
        f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}) are stored in a quantized format and do not vary:"
        " measure flatlab.plain_network(model), whose weights are plain."
    )


def versions(model: nn.Module, moved: Iterable[Tensor]) -> Versions:
    """Return the versions of buffers and of parameters that do not vary: they change with each write or replacement."""
    ours = {id(tensor) for tensor in moved}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {n: (id(t), version(t)) for n, t in named if id(t) not in ours}


def version(tensor: Tensor) -> int:
    """Return the number of writes to a tensor that torch counts, without those that were undone."""
    return 0 if tensor.is_inference() else tensor._version - _UNDONE.get(tensor, 0)


def note_undone(tensors: Sequence[Tensor], before: Sequence[int]) -> None:
    """Do not count the writes since `before`, the versions of some tensors whose bits are again those of then."""
    for tensor, number in zip(tensors, before, strict=True):
        if writes := version(tensor) - number:
            _UNDONE[tensor] = _UNDONE.get(tensor, 0) + writes


def data_versions(batches: Iterable[Iterable[Batch]]) -> list[int]:
    """Return the versions of the tensors of all strata's batches, which change with each write that torch counts."""
    nests = (nest for each in batches for batch in each for nest in batch[:2])
    leaves = (leaf for nest in nests for leaf in ([nest] if isinstance(nest, Tensor) else tensors(nest)))
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def written(model: nn.Module, moved: Iterable[Tensor], before: Versions) -> str | None:
    """Return the name of a tensor that was written or replaced since; None if there is none."""
    return min((name for name, _ in versions(model, moved).items() ^ before.items()), default=None)


def refuse_changed(model: nn.Module, moved: Sequence[Tensor], point: Tensor, before: Versions) -> None:
    """Refuse a model whose tensors have changed since its landscape was built."""
    here = all(tensor.device == point.device for tensor in moved)
    # Bits are compared, not numbers: NaN is NaN, and -0.0 is not 0.0.
    if not (here and torch.equal(flatten(moved).to(point.dtype).view(torch.uint8), point.view(torch.uint8))):
        raise UserError(
            "The weights are not those that the landscape was built on (trained since, or moved by an open"
            " `moving`): build a new Landscape."
        )
    if changed := written(model, moved, before):
        raise UserError(f"{changed!r} has changed since the landscape was built: build a new Landscape.")
