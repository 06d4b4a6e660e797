"""Outer products of the outputs' Jacobian: the Gauss-Newton matrix and the Fisher matrix of a landscape's loss."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flatlab.derivatives.autograd import Apply, pullback
from flatlab.derivatives.differentiation import dual_numbers, tangent_of
from flatlab.derivatives.operators import Around, Curvature, Method, Term
from flatlab.errors import UserError, choose
from flatlab.tensors.nested import tensors
from flatlab.tensors.structures import mapped

Values = Callable[[Sequence[Tensor]], Tensor]
"""The function from the outputs of a batch that the loss reads to the sum of its losses."""


class _OuterProduct(Curvature):
    """J' M J, with J the Jacobian of the outputs that the loss reads and M a matrix on them, diagonal over samples."""

    @abstractmethod
    def _middle(self, outputs: Sequence[Tensor], total: Values, count: float) -> Apply:
        """Return M as a function of tensors with the shapes of the outputs."""

    def _graph(self, term: Term) -> Apply:
        inputs, total, count = term
        outputs, of_read = _read(self._outputs(inputs), total)
        middle = self._middle([z.detach() for z in outputs], of_read, count)
        # The derivative of J'u by u, applied to v, is J v: two backward passes make a forward one.
        us = [torch.zeros_like(z, requires_grad=True) for z in outputs]
        pushed = pullback(
            torch.autograd.grad(outputs, self._tensors, us, create_graph=True, materialize_grads=True), us
        )

        def apply(views: Sequence[Tensor]) -> Sequence[Tensor]:
            back = middle(pushed(views))
            return torch.autograd.grad(outputs, self._tensors, back, retain_graph=True, materialize_grads=True)

        return apply

    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs, total, count = term
        with dual_numbers(self._named, views) as duals:
            outputs, of_read = _read(self._outputs(inputs, duals), total)
            tangents = [tangent_of(z) for z in outputs]
        pushed = [torch.zeros_like(z) if t is None else t.detach() for z, t in zip(outputs, tangents, strict=True)]
        back = self._middle([z.detach() for z in outputs], of_read, count)(pushed)
        return torch.autograd.grad(outputs, self._tensors, back, materialize_grads=True)


def _read(outputs: Any, total: Callable[[Any], Tensor]) -> tuple[list[Tensor], Values]:
    """Return the tensors of the outputs that the loss depends on, and the loss as a function of only these."""
    if isinstance(outputs, Tensor):
        return [outputs], lambda zs: total(zs[0])
    found = [leaf for leaf in tensors(outputs) if leaf.requires_grad]
    apart = [leaf.detach().requires_grad_() for leaf in found]
    slopes = torch.autograd.grad(total(_with(outputs, found, apart)), apart, allow_unused=True)
    read = [leaf for leaf, slope in zip(found, slopes, strict=True) if slope is not None]
    return read, lambda zs: total(_with(outputs, read, zs))


def _with(outputs: Any, old: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    """Return a nest with some of its tensors replaced."""
    places = {id(before): after for before, after in zip(old, new, strict=True)}
    return mapped(lambda leaf: places.get(id(leaf), leaf), outputs)


class GGN(_OuterProduct):
    """The generalised Gauss-Newton matrix J' H_out J, H_out the Hessian of the loss by the outputs (Schraudolph 2002).

    It is the Hessian without the curvature of the network itself; positive semi-definite where the loss is convex.
    """

    name = "GGN"

    def _middle(self, outputs: Sequence[Tensor], total: Values, count: float) -> Apply:
        zs = [z.requires_grad_() for z in outputs]
        slopes = torch.autograd.grad(total(zs) / count, zs, create_graph=True, materialize_grads=True)
        return pullback(slopes, zs)


class Fisher(_OuterProduct):
    """The Fisher matrix of a classifier whose outputs (n, C) are logits, averaged as the loss is.

    Args:
        landscape: as in `Curvature`.
        kind: "expected" takes labels from the model's own softmax, and then equals the GGN of the cross-entropy without
            label smoothing; "empirical" takes the data's labels: the mean of g g' over the samples' gradients g, which
            is another matrix (Kunstner et al. 2019).
        method, fold: as in `Curvature`.

    Raises:
        UserError: if the loss weighs the samples itself, by a pair (sums, weights).
    """

    name = "Fisher matrix"

    def __init__(
        self,
        landscape: Around,
        *,
        kind: Literal["expected", "empirical"] = "expected",
        method: Method = "auto",
        fold: bool = True,
    ) -> None:
        self.kind = choose("kind of Fisher matrix", kind, ("expected", "empirical"))
        if getattr(landscape, "weighs_samples", False):
            raise UserError(
                f"The {self.name} is a mean over samples of equal weight, but the loss returns a pair (sums, weights):"
                " use GGN, or pass a loss with one number per sample."
            )
        super().__init__(landscape, method=method, fold=fold)

    def _middle(self, outputs: Sequence[Tensor], total: Values, count: float) -> Apply:
        if len(outputs) != 1:
            raise UserError(
                f"The {self.name} needs a loss that reads one tensor of the outputs, got one that reads {len(outputs)}:"
                " use GGN."
            )
        z = outputs[0]
        if self.kind == "empirical":
            (slope,) = torch.autograd.grad(total([z.requires_grad_()]), [z])
            axes = tuple(range(1, slope.ndim))
            return lambda us: [slope * ((slope * us[0]).sum(axes, keepdim=True) if axes else slope * us[0]) / count]
        if z.ndim != 2 or z.shape[1] < 2:
            raise UserError(
                f"The expected Fisher matrix needs logits of shape (n, C), got outputs {tuple(z.shape)}:"
                ' take kind="empirical" or GGN.'
            )
        shares = z.softmax(1)
        return lambda us: [shares * (us[0] - (shares * us[0]).sum(1, keepdim=True)) / count]
