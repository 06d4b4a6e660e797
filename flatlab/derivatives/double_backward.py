"""Double backward passes that cost what their arithmetic costs; torch's own are exact, but slower.

A convolution y = w * x is bilinear, so each of its second derivatives is again a convolution or one of its two
transposes. torch computes two of them with the output as a kernel, in a loop over the groups, which takes much of the
time of a Hessian-vector product of depthwise layers. Of a clamp it adds the second derivative, which is zero, as a
tensor of zeros.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""Stride, padding, dilation, transposed, output padding and groups, as torch.ops.aten.convolution takes them."""
CONVS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class DoubleBackward(TorchFunctionMode):
    """Inside the block, convolutions and clamps are those of this module; their values and derivatives are equal.

    Forward mode is not supported. What torch.func transforms or autocast changes is left to torch.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if func in CONVS:
            return _convolution(func, *args, **given)
        if func is F.relu6:
            return _clamp(func, *args, **given)
        if func is F.hardtanh:
            return _hardtanh(*args, **given)
        return func(*args, **given)


def _convolution(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    axes = CONVS[func]
    plain = not isinstance(padding, str) and input.ndim == weight.ndim == axes + 2 and weight.is_floating_point()
    if not plain or not _differentiable(input, weight):
        return func(input, weight, bias, stride, padding, dilation, groups)
    step, pad, spread = (_each_axis(each, axes) for each in (stride, padding, dilation))
    result: Tensor = _Convolution.apply(input, weight, bias, (step, pad, spread, False, [0] * axes, groups))
    return result


def _each_axis(given: Any, axes: int) -> list[int]:
    listed = [given] if isinstance(given, int) else list(given)
    return listed * axes if len(listed) == 1 else listed


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    return _clamp(F.hardtanh, input, inplace, min_val=min_val, max_val=max_val)


def _clamp(func: Callable[..., Tensor], input: Tensor, inplace: bool = False, **bounds: float) -> Tensor:
    if not input.is_floating_point() or not _differentiable(input) or (inplace and input._is_view()):
        return func(input, inplace=inplace, **bounds)
    low, high = bounds.get("min_val", 0.0), bounds.get("max_val", 6.0)
    result: Tensor = _Clamp.apply(input, low, high, inplace)
    return result


def _differentiable(*tensors: Tensor) -> bool:
    """Return whether autograd records a function of these tensors as it stands."""
    device = tensors[0].device.type
    open_to_us = not torch._C._are_functorch_transforms_active() and not torch.is_autocast_enabled(device)
    return open_to_us and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Convolution(torch.autograd.Function):
    """A convolution with bias; its backward pass is `_Transposes`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        return _convolve(input, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        *wanted, to_bias = ctx.needs_input_grad[:3]
        by = _Transposes.apply(slope, *ctx.saved_tensors, ctx.geometry, wanted) if any(wanted) else (None, None)
        return *by, slope.sum([0, *range(2, slope.ndim)]) if to_bias else None, None


class _Transposes(torch.autograd.Function):
    """Both transposes of a convolution, applied to the derivative by its output."""

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope, input, weight)
        ctx.geometry = geometry
        return _transposes(slope, input, weight, geometry, wanted)

    @staticmethod
    def backward(ctx: Any, along_input: Tensor | None, along_weight: Tensor | None) -> Any:
        slope, input, weight = ctx.saved_tensors
        of_slope, of_input, of_weight = ctx.needs_input_grad[:3]
        by_slope = by_input = by_weight = None
        if along_input is not None:
            by_slope = _convolve(along_input, weight, None, ctx.geometry) if of_slope else None
            by_weight = _transposes(slope, along_input, weight, ctx.geometry, (False, of_weight))[1]
        if along_weight is not None:
            if of_slope:
                term = _convolve(input, along_weight, None, ctx.geometry)
                by_slope = term if by_slope is None else by_slope + term
            by_input = _transposes(slope, input, along_weight, ctx.geometry, (of_input, False))[0]
        return by_slope, by_input, by_weight, None, None


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    result: Tensor = torch.ops.aten.convolution(input, weight, bias, *geometry)
    return result


def _transposes(
    slope: Tensor, input: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the derivatives of <slope, input * weight> by input and weight, those that are wanted."""
    if not any(wanted):
        return None, None
    by_input, by_weight, _ = torch.ops.aten.convolution_backward(
        slope, input, weight, None, *geometry, [*wanted, False]
    )
    return by_input, by_weight


class _Clamp(torch.autograd.Function):
    """A clamp to an interval, whose derivative is one inside it and zero at its ends and beyond."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        result = input.clamp_(low, high) if inplace else input.clamp(low, high)
        if inplace:
            ctx.mark_dirty(input)
        ctx.save_for_backward(result if inplace else input)  # as torch: the other may be written to
        ctx.bounds = low, high
        return result

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        return _Inside.apply(slope, ctx.saved_tensors[0].detach(), *ctx.bounds), None, None, None


class _Inside(torch.autograd.Function):
    """Zero where a value is at an end of the interval or beyond, the slope elsewhere: linear in the slope alone."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = low, high
        result: Tensor = torch.ops.aten.hardtanh_backward(slope, value, low, high)
        return result

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> Any:
        return _Inside.apply(along, ctx.saved_tensors[0], *ctx.bounds), None, None, None
