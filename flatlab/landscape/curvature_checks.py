"""A check of second derivatives: whether autograd's Hessian is symmetric, and the derivative of autograd's gradient.

It uses a few samples in double precision, with steps so small that hardly any ReLU changes sign: neither number then
contains the curvature of the kinks. The point is moved slightly first, since a kink at the point itself (a bias that is
zero behind a black border) has no derivative to compare with.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from flatlab.derivatives.autograd import pullback, total_at, twice_differentiable
from flatlab.derivatives.exact import exact_derivatives
from flatlab.errors import UserError
from flatlab.landscape.checks import Total
from flatlab.seeds import generator
from flatlab.tensors.flat import flatten, scales_of, split_like
from flatlab.tensors.nested import Batch, converted

Loss = Callable[[Sequence[Tensor]], Tensor]
"""The mean loss on a few samples, of tensors with the shapes of the parameters."""

SAMPLED = 8  # samples that the check uses
DRAWS = 2  # the check must fail along as many directions, from different points
FAR = 4  # moves by the size of each tensor, of which one must change a loss that depends on them
AWAY = 1e-3  # of each tensor's size: by which the point is moved
MOVED, MOVE = 8, 1e-4  # entries that are moved to detect rounding, and by how much of their tensor's size
STEPS = (1e-5, 1e-7, 1e-8)  # of each tensor's size; of 1e7 activations 0.1 change sign at the last
SLACK = {torch.float64: 2e-2, torch.float32: 5e-2}  # a wrong formula is off by far more, rounding by far less
# Nats below which a number counts as zero: for confident networks, softmax minus one is rounded to zero.
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Products:
    """A Hessian times two directions u and v, all in units of each tensor's size, so that each entry is in nats."""

    directions: tuple[Tensor, Tensor]
    products: tuple[Tensor, Tensor]
    floor: float  # nats: differences up to this may be rounding


def check_second_derivatives(
    model: nn.Module, moved: Mapping[str, Tensor], batches: Sequence[Batch], total: Total
) -> None:
    """Refuse a loss whose second derivatives autograd gets wrong; costs 2 products and 6 gradients, or twice as many.

    A model that cannot compute in double precision is checked in its own, only for symmetry and for weights that are
    rounded: no step is small enough there for differences of gradients.

    Args:
        model: is called with copies of its tensors.
        moved: the parameters that vary, by name.
        batches: a few samples.
        total: from outputs and batch to the sum of the losses.

    Raises:
        UserError: if the Hessian is not symmetric, or not the derivative of the gradient, or cannot be checked.
    """
    own = next(iter(moved.values())).dtype
    if own != torch.float32:
        with exact_derivatives(model):
            _refuse_unmoved(*_function(model, moved, batches, total, own), [*moved.values()])
    for dtype in dict.fromkeys((torch.float64, own)):
        # A model that fails in its own precision, too, has no second derivative: the product's error states why.
        with suppress(RuntimeError, TypeError), exact_derivatives(model):
            return _refuse_faults(*_function(model, moved, batches, total, dtype))


def _function(
    model: nn.Module, moved: Mapping[str, Tensor], batches: Sequence[Batch], total: Total, dtype: torch.dtype
) -> tuple[Loss, list[Tensor]]:
    """Return the mean loss on some samples in a precision, and the point in it."""
    few = [converted(batch, dtype) for batch in batches]
    ours = {id(p) for p in moved.values()}
    state = {n: t.detach() for n, t in chain(model.named_parameters(), model.named_buffers()) if id(t) not in ours}
    fixed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}

    def value_at(tensors: Sequence[Tensor]) -> Tensor:
        state = {**fixed, **dict(zip(moved, tensors, strict=True))}
        sums = [total_at(model, state, b.inputs, partial(_of, total, b)) for b in few]
        return torch.stack(sums).sum() / sum(batch.size for batch in few)

    def loss(tensors: Sequence[Tensor]) -> Tensor:
        value = value_at(tensors)
        if not value.requires_grad:
            raise UserError(_without_gradient(value_at, tensors, ", ".join(list(moved)[:4])))
        return value

    return loss, [tensor.detach().to(dtype) for tensor in moved.values()]


def _without_gradient(loss: Loss, point: Sequence[Tensor], names: str) -> str:
    """Return why the loss has no gradient by the parameters: whether it changes where they are moved far."""
    rng, scales = generator("curvature", "far"), scales_of(point)
    here = loss(point)
    for _ in range(FAR):
        step = scales * torch.randn(len(scales), generator=rng, dtype=scales.dtype).to(scales)
        if not torch.equal(here, loss(split_like(flatten(point) + step, point))):
            return (
                f"The loss depends on the parameters that vary ({names}), but autograd finds no gradient by them, so it"
                " has no curvature: it is piecewise constant, as a number of errors is; pass one with a gradient,"
                " such as cross_entropy."
            )
    return (
        f"The loss does not depend on the parameters that vary ({names}), so it has no curvature by them: choose others"
        " with params=."
    )


def _recomputes(loss: Loss, point: Sequence[Tensor]) -> bool:
    """Return whether a forward pass leaves saved tensors to hooks, as torch.utils.checkpoint does."""
    refused = "flatlab: no hooks here"
    try:
        with disable_saved_tensors_hooks(refused):
            loss([tensor.clone().requires_grad_() for tensor in point])
    except RuntimeError as error:
        return refused in str(error)
    return False


def _refuse_unmoved(loss: Loss, point: Sequence[Tensor], own: Sequence[Tensor]) -> None:
    """Refuse a loss of copies of the parameters, as curvature needs them, that uses the parameters themselves."""
    if _recomputes(loss, point):
        raise UserError(
            "Layers of the model are computed again in the backward pass (torch.utils.checkpoint), then with the"
            " model's own weights, not with the moved or widened copies that curvature needs: switch checkpointing"
            " off, or use the model in float32."
        )
    if own[0].itemsize >= 4:
        return
    value = loss([tensor.clone().requires_grad_() for tensor in point])
    read = torch.autograd.grad(value, [each for each in own if each.requires_grad], allow_unused=True)
    if any(each is not None for each in read):
        raise UserError(
            "The loss reads parameters of the model that were kept outside of it (a list for a penalty), but the"
            f" curvature of a model in {own[0].dtype} is that of widened copies: read model.parameters() in each call,"
            " or use the model in float32."
        )


def _of(total: Total, batch: Batch, outputs: Any) -> Tensor:
    return total(outputs, batch)


def _refuse_faults(loss: Loss, point: Sequence[Tensor]) -> None:
    sentence = ""
    for draw in range(DRAWS):
        if not (sentence := _fault(loss, point, draw)):
            return
    raise UserError(sentence)


def _fault(loss: Loss, point: Sequence[Tensor], draw: int) -> str:
    rng = generator("curvature", "probe", draw)
    scales = scales_of(point)
    away, u, v = (torch.randn(len(scales), generator=rng, dtype=scales.dtype).to(scales) for _ in range(3))
    there = flatten(point) + AWAY * scales * away

    def gradient(vector: Tensor, *, graph: bool = False) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        leaves = [t.clone().requires_grad_() for t in split_like(vector, point)]
        value = loss(leaves)
        return value, torch.autograd.grad(value, leaves, create_graph=graph, materialize_grads=True), leaves

    with twice_differentiable():
        value, grads, leaves = gradient(there, graph=True)
        apply = pullback(grads, leaves)
        hu, hv = (scales * flatten(apply(split_like(scales * each, point))) for each in (u, v))
    floor = FLOOR.get(scales.dtype, 1.0) * (1 + abs(float(value.detach())))
    found = Products((u, v), (hu, hv), floor)
    if not all(bool(torch.isfinite(each).all()) for each in found.products):
        return ""  # the product itself raises
    if sentence := _asymmetry(found):
        return sentence
    if scales.dtype != torch.float64:
        return _straight_through(loss, point, there)
    with twice_differentiable():
        slopes = [
            scales * (flatten(gradient(there + h * scales * v)[1]) - flatten(gradient(there - h * scales * v)[1]))
            for h in STEPS
        ]
    sentence = _difference(found, [slope / (2 * h) for slope, h in zip(slopes, STEPS, strict=True)])
    return sentence and (_straight_through(loss, point, there) or sentence)


def _straight_through(loss: Loss, point: Sequence[Tensor], there: Tensor) -> str:
    """Return which tensor has a gradient but does not change the loss in a small move, as a sentence; empty if none.

    The entries that the loss is said to change most by are moved, few enough that hardly any passes a threshold.
    """
    leaves = [t.clone().requires_grad_() for t in split_like(there, point)]
    value = loss(leaves)
    slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
    units = split_like(scales_of(point), point)
    for index, (slope, unit) in enumerate(zip(slopes, units, strict=True)):
        claims = (slope * unit).abs().flatten()
        least = claims.topk(min(MOVED, len(claims))).values[-1:].sum()
        step = MOVE * unit * slope.sign() * ((slope * unit).abs() >= least)
        if float((slope * step).sum()) < 100 * torch.finfo(step.dtype).eps * (1 + abs(float(value.detach()))):
            continue
        moved = loss([leaf + step if index == other else leaf for other, leaf in enumerate(leaves)])
        if torch.equal(moved, value):
            return (
                f"The loss does not change when a tensor of the shape {tuple(slope.shape)} moves slightly, but autograd"
                " gives it a gradient: it is rounded in the forward pass (a straight-through estimator), so that the"
                " curvature is not that of the loss; measure flatlab.plain_network(model) where torch.ao, torchao or"
                " brevitas rounds it, else put the rounded weights themselves into the model."
            )
    return ""


def _asymmetry(found: Products) -> str:
    (u, v), (hu, hv) = found.directions, found.products
    one, other, size = float(u @ hv), float(v @ hu), max(float(hu.norm()), float(hv.norm()))
    if abs(one - other) <= SLACK.get(u.dtype, 0.5) * size + found.floor * len(u) ** 0.5:
        return ""
    return (
        f"Autograd's Hessian H is not symmetric, so some function in the model has a wrong second derivative: along two"
        f" random directions u'Hv is {one:.4g}, but v'Hu is {other:.4g}; if it is weight_norm, replace it by the"
        " weight itself (torch.nn.utils.remove_weight_norm, or parametrize.remove_parametrizations)."
    )


def _difference(found: Products, slopes: Sequence[Tensor]) -> str:
    hv = found.products[1]
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
        return ""
    off = min(float((slope - hv).norm()) for slope in slopes)
    size = max(float(hv.norm()), float(slopes[-1].norm()))
    # Differences that disagree with each other (a kink between the points, rounding) do not count.
    unsettled = float((slopes[-1] - slopes[-2]).norm())
    if off <= SLACK[torch.float64] * size + 10 * unsettled + found.floor:
        return ""
    return (
        f"Autograd's Hessian is not the derivative of the gradient: times a random direction the two differ by"
        f" {off / size:.0%}, so some derivatives in the model are not those of its function (rounding by detach, a"
        " custom backward): put the rounded weights themselves into the model, or exclude them with"
        " requires_grad_(False)."
    )
