"""What a layer sees: the second moments of its inputs, over calibration data, for post-training quantization."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatlab.errors import UserError
from flatlab.quant.attach import layers, tensor_of

COLUMNS = 2**24  # numbers unfolded at a time: a depthwise layer's inputs grow ninefold


def second_moments(network: nn.Module, batches: Iterable[Tensor], *, outside: str = "head") -> dict[str, Tensor]:
    """Return H = 2 X X' / n of the inputs X of each layer that can be quantized, float64 (OBC, trueobs.py).

    A convolution is the linear map that acts on unfolded patches. The network sees its own, unquantized activations.

    Args:
        network: in eval mode; left as it is.
        batches: inputs of the network.
        outside: as in `attach`.

    Returns:
        By the layer's name, shape (groups, columns, columns): of a grouped convolution, one for each group.

    Raises:
        UserError: inputs that do not fit, or are not finite; a layer that they never reach.
    """
    found = layers(network, outside=outside)
    watch = _Watch({id(getattr(layer, tensor_of(layer))): name for name, layer in found.items()})
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide the layers inside
    try:
        for batch in batches:
            _show(network, batch, watch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for name in found:
        if name not in watch.sums:
            raise UserError(f"{name} saw no calibration input: the network does not use it, or no data were given.")
        if not torch.isfinite(watch.sums[name]).all():
            raise UserError(f"Calibration made inputs of {name} that are not finite; look for NaN in the data.")
    return {name: 2 * watch.sums[name] / watch.counts[name] for name in found}


@torch.no_grad()
def _show(network: nn.Module, batch: Tensor, watch: "_Watch") -> None:
    if not isinstance(batch, Tensor):
        raise UserError(f"Calibration data are batches of inputs, tensors; {type(batch).__name__} came.")
    try:
        with watch:
            network(batch)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"Calibration inputs of shape {tuple(batch.shape)} do not fit the network: {reason}") from None


class _Watch(TorchFunctionMode):
    """Looks at each convolution and linear map that is computed, and knows its weight: no hook is left behind."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add up what a known weight is applied to, and let the call through."""
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
        given |= kwargs or {}
        name = self.names.get(id(given.get("weight")))
        if name and func in (F.linear, torch.conv2d):
            self._add(name, given, linear=func is F.linear)
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, given: Mapping[str, Any], *, linear: bool) -> None:
        inputs = given["input"]
        if linear:
            self._sum(name, inputs.reshape(1, -1, inputs.shape[-1]).mT)
            return
        grown = math.prod(given["weight"].shape[2:]) * max(1, inputs[0].numel())
        for part in inputs.split(max(1, COLUMNS // grown)):
            self._sum(name, _patches(part, given))

    def _sum(self, name: str, columns: Tensor) -> None:
        columns = columns.double()  # (groups, columns, samples)
        moments = columns @ columns.mT
        self.sums[name] = self.sums[name] + moments if name in self.sums else moments
        self.counts[name] = self.counts.get(name, 0) + columns.shape[-1]


def _patches(inputs: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Return what a convolution multiplies its weight with, shape (groups, columns, samples)."""
    kernel, groups = given["weight"].shape[2:], given.get("groups", 1)
    stride, dilation, padding = (
        given.get(name, usual) for name, usual in (("stride", 1), ("dilation", 1), ("padding", 0))
    )
    if isinstance(padding, str):
        steps = dilation if isinstance(dilation, tuple | list) else (dilation, dilation)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(steps, kernel, strict=True)]
        inputs, padding = (
            F.pad(inputs, [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]),
            0,
        )
    unfolded = F.unfold(inputs, tuple(kernel), dilation=dilation, padding=padding, stride=stride)
    apart = unfolded.reshape(len(inputs), groups, -1, unfolded.shape[-1])  # (N, groups, columns, places)
    return apart.permute(1, 2, 0, 3).flatten(2)
