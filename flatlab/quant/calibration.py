"""Second moments of the inputs of layers over calibration data, for post-training quantization."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatlab.errors import UserError, reason
from flatlab.quant.attach import layers, tensor_of

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # torch's arguments
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
CONVOLUTIONS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), CONVOLUTION),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), TRANSPOSED),
}
COLUMNS = 2**24  # numbers unfolded at a time: a 3 x 3 kernel makes inputs nine times as large


def second_moments(network: nn.Module, batches: Iterable[Tensor], *, outside: str = "head") -> dict[str, Tensor]:
    """Return H = 2 X X' / n of the inputs X of each layer that can be quantized, float64 (OBC, trueobs.py).

    A convolution is treated as a linear map of unfolded patches, a transposed one as that of the input with zeros
    inserted, with columns in the order of a weight whose output channels are first. All inputs are those of the
    unquantized network.

    Args:
        network: the network in eval mode; it is not changed.
        batches: inputs of the network.
        outside: first component of the names of layers that are excluded: the head.

    Returns:
        By the layer's name, shape (groups, columns, columns); groups is 1 except for grouped convolutions.

    Raises:
        UserError: inputs do not fit the network or are not finite, or a layer receives none.
    """
    found = layers(network, outside=outside)
    known = {name: id(getattr(layer, tensor_of(layer))) for name, layer in found.items()}  # tied weights share one
    watch = _Watch(known.values())
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path does not call the layers inside
    try:
        for batch in batches:
            _show(network, batch, watch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for name, weight in known.items():
        if weight not in watch.sums:
            raise UserError(
                f"{name} received no calibration input: the network does not use it, or no data were given."
            )
        if not torch.isfinite(watch.sums[weight]).all():
            raise UserError(f"Calibration inputs of {name} are not finite: check the images for NaN.")
    return {name: 2 * watch.sums[weight] / watch.counts[weight] for name, weight in known.items()}


@torch.no_grad()
def _show(network: nn.Module, batch: Tensor, watch: "_Watch") -> None:
    if not isinstance(batch, Tensor):
        raise UserError(f"Calibration data must be batches of inputs (tensors), got a {type(batch).__name__}.")
    try:
        with watch:
            network(batch)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Calibration inputs of shape {tuple(batch.shape)} do not fit the network: {reason(error)}"
        ) from None


class _Watch(TorchFunctionMode):
    """Sums moments of the inputs of each layer with a known weight, by intercepting torch's functions."""

    def __init__(self, known: Iterable[int]) -> None:
        super().__init__()
        self.known = set(known)  # by id
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Add the moments of what a known weight is applied to, and return what the function returns."""
        if func is F.multi_head_attention_forward:
            return self._attend(inspect.signature(func).bind(*args, **(kwargs or {})))
        given = dict(zip(CONVOLUTIONS.get(func, CONVOLUTION), args, strict=False)) | (kwargs or {})
        if func is F.linear:
            self._see(given["weight"], given["input"])
        elif func is torch.addmm and not kwargs:  # GPT-2's Conv1D: bias, inputs, weight
            self._see(args[2], args[1])
        elif func is F.bilinear:
            first, second, weight = args[:3]
            self._see(weight, (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2))
        elif func in CONVOLUTIONS and id(given["weight"]) in self.known:
            kernel, inputs = given["weight"].shape[2:], given["input"]
            inputs = inputs if inputs.dim() == len(kernel) + 2 else inputs.unsqueeze(0)
            grown = math.prod(kernel) * max(1, inputs[0].numel())
            for part in inputs.split(max(1, COLUMNS // grown)):
                patches = _patches(part, given, transposed=CONVOLUTIONS[func] is TRANSPOSED)
                self._sum(id(given["weight"]), patches)
        return func(*args, **(kwargs or {}))

    def _attend(self, call: inspect.BoundArguments) -> Any:
        """Compute attention with the identity as output projection, to obtain that projection's input."""
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


def _patches(inputs: Tensor, given: Mapping[str, Any], *, transposed: bool) -> Tensor:
    """Return the unfolded inputs of a convolution, shape (groups, columns, samples)."""
    kernel, groups = given["weight"].shape[2:], given.get("groups", 1)
    usual = {"stride": 1, "dilation": 1, "padding": 0, "output_padding": 0}
    stride, dilation, padding, extra = (_each(given.get(name, usual[name]), len(kernel)) for name in usual)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if given.get("padding") == "same":
        pads = [(total // 2, total - total // 2) for total in reach]
    elif transposed:
        inputs, stride = _spread(inputs, stride), (1,) * len(kernel)
        pads = [(total - p, total - p + e) for total, p, e in zip(reach, padding, extra, strict=True)]
    else:
        pads = [(p, p) for p in padding]
    windows = F.pad(inputs, [side for pair in reversed(pads) for side in pair])
    for axis, (total, s, d) in enumerate(zip(reach, stride, dilation, strict=True), start=2):
        windows = windows.unfold(axis, total + 1, s)[..., ::d]
    places, taps = range(3, 3 + len(kernel)), range(3 + len(kernel), 3 + 2 * len(kernel))
    if transposed:
        windows = windows.flip([axis - 1 for axis in taps])
    channels = inputs.shape[1] // groups
    apart = windows.reshape(len(inputs), groups, channels, *windows.shape[2:])  # (N, groups, channels, *places, *taps)
    return apart.permute(1, 2, *taps, 0, *places).reshape(groups, channels * math.prod(kernel), -1)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """Return an argument of a convolution for each dimension; 0 for a named padding."""
    if isinstance(value, str):
        return (0,) * dims
    several = tuple(value) if isinstance(value, tuple | list) else (value,)
    return several * dims if len(several) == 1 else several


def _spread(inputs: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return inputs with zeros between them, as a transposed convolution with this stride reads them."""
    size = [(n - 1) * s + 1 for n, s in zip(inputs.shape[2:], stride, strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *size)
    among = spread
    for axis, step in enumerate(stride, start=2):
        among = among[(slice(None),) * axis + (slice(None, None, step),)]
    among.copy_(inputs)
    return spread
