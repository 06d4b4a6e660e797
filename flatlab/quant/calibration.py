"""What a layer sees: the second moments of its inputs, over calibration data, for post-training quantization."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatlab.errors import UserError
from flatlab.quant.attach import layers, tensor_of

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # torch.conv2d's arguments
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
    known = {name: id(getattr(layer, tensor_of(layer))) for name, layer in found.items()}  # tied weights share one
    watch = _Watch(known.values())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would hide the layers inside
    try:
        for batch in batches:
            _show(network, batch, watch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for name, weight in known.items():
        if weight not in watch.sums:
            raise UserError(f"{name} saw no calibration input: the network does not use it, or no data were given.")
        if not torch.isfinite(watch.sums[weight]).all():
            raise UserError(f"Calibration made inputs of {name} that are not finite; look for NaN in the data.")
    return {name: 2 * watch.sums[weight] / watch.counts[weight] for name, weight in known.items()}


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
    """Looks at each convolution, linear map and self-attention that is computed with a known weight; hooks nothing."""

    def __init__(self, known: Iterable[int]) -> None:
        super().__init__()
        self.known = set(known)  # by id
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add up what a known weight is applied to, and let the call through."""
        if func is F.multi_head_attention_forward:
            return self._attend(inspect.signature(func).bind(*args, **(kwargs or {})))
        given = dict(zip(CONVOLUTION, args, strict=False)) | (kwargs or {})
        if func is F.linear:
            self._see(given["weight"], given["input"])
        elif func is torch.conv2d and id(given["weight"]) in self.known:
            grown = math.prod(given["weight"].shape[2:]) * max(1, given["input"][0].numel())
            for part in given["input"].split(max(1, COLUMNS // grown)):
                self._sum(id(given["weight"]), _patches(part, given))
        return func(*args, **(kwargs or {}))

    def _attend(self, call: inspect.BoundArguments) -> Any:
        """Attend with an identity in place of the output's map, whose input is then at hand."""
        given = call.arguments
        if given["query"] is given["key"] is given["value"]:
            self._see(given["in_proj_weight"], given["query"])
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        given |= {"out_proj_weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        given |= {"out_proj_bias": torch.zeros_like(weight[0])}
        mixed, attention = F.multi_head_attention_forward(*call.args, **call.kwargs)
        self._see(weight, mixed)
        return F.linear(mixed, weight, bias), attention

    def _see(self, weight: Tensor, inputs: Tensor) -> None:
        if id(weight) in self.known:
            self._sum(id(weight), inputs.reshape(1, -1, inputs.shape[-1]).mT)

    def _sum(self, weight: int, columns: Tensor) -> None:
        columns = columns.double()  # (groups, columns, samples)
        moments = columns @ columns.mT
        self.sums[weight] = self.sums[weight] + moments if weight in self.sums else moments
        self.counts[weight] = self.counts.get(weight, 0) + columns.shape[-1]


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
