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


class _OuterProduct(Curvature):
    """J' M J, with J the Jacobian of the outputs and M a matrix on them, block-diagonal over samples."""

    @abstractmethod
    def _middle(self, outputs: Tensor, total: Callable[[Any], Tensor], count: float) -> Callable[[Tensor], Tensor]:
        """Return M as a function of a vector with the shape of the outputs."""

    def _graph(self, term: Term) -> Apply:
        inputs, total, count = term
        outputs = self._tensor(self._outputs(inputs))
        middle = self._middle(outputs.detach(), total, count)
        # The derivative of J'u by u, applied to v, is J v: two backward passes make a forward one.
        u = torch.zeros_like(outputs, requires_grad=True)
        pushed = pullback(
            torch.autograd.grad(outputs, self._tensors, u, create_graph=True, materialize_grads=True), [u]
        )

        def apply(views: Sequence[Tensor]) -> Sequence[Tensor]:
            back = middle(pushed(views)[0])
            return torch.autograd.grad(outputs, self._tensors, back, retain_graph=True, materialize_grads=True)

        return apply

    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs, total, count = term
        with dual_numbers(self.landscape.named, views) as duals:
            outputs = self._tensor(self._outputs(inputs, duals))
            tangent = tangent_of(outputs)
        if tangent is None:
            return [torch.zeros_like(v) for v in views]
        back = self._middle(outputs.detach(), total, count)(tangent.detach())
        return torch.autograd.grad(outputs, self._tensors, back, materialize_grads=True)

    def _tensor(self, outputs: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            return outputs
        raise UserError(f"The {self.name} needs a model that returns one tensor, got a {type(outputs).__name__}.")


class GGN(_OuterProduct):
    """The generalised Gauss-Newton matrix J' H_out J, H_out the Hessian of the loss by the outputs (Schraudolph 2002).

    It is the Hessian without the curvature of the network itself; positive semi-definite where the loss is convex.
    """

    name = "GGN"

    def _middle(self, outputs: Tensor, total: Callable[[Any], Tensor], count: float) -> Callable[[Tensor], Tensor]:
        z = outputs.requires_grad_()
        slope = torch.autograd.grad(total(z) / count, [z], create_graph=True, materialize_grads=True)
        pull = pullback(slope, [z])
        return lambda u: pull([u])[0]


class Fisher(_OuterProduct):
    """The Fisher matrix of a classifier whose outputs (n, C) are logits, averaged as the loss is.

    Args:
        landscape: as for any curvature.
        kind: "expected" takes labels from the model's own softmax, and then equals the GGN of the cross-entropy without
            label smoothing; "empirical" takes the data's labels, the mean of g g' over the samples' gradients g, which
            is another matrix (Kunstner et al. 2019).
        method, fold: as for any curvature.

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
        if landscape.weighs_samples:
            raise UserError(
                f"The {self.name} is a mean over samples of equal weight, but the loss returns a pair (sums, weights):"
                " use GGN, or pass a loss with one number per sample."
            )
        super().__init__(landscape, method=method, fold=fold)

    def _middle(self, outputs: Tensor, total: Callable[[Any], Tensor], count: float) -> Callable[[Tensor], Tensor]:
        if self.kind == "empirical":
            z = outputs.requires_grad_()
            (slope,) = torch.autograd.grad(total(z), [z])
            axes = tuple(range(1, slope.ndim))
            return lambda u: slope * ((slope * u).sum(axes, keepdim=True) if axes else slope * u) / count
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise UserError(
                f"The expected Fisher matrix needs logits of shape (n, C), got outputs {tuple(outputs.shape)}:"
                ' take kind="empirical" or GGN.'
            )
        shares = outputs.softmax(1)
        return lambda u: shares * (u - (shares * u).sum(1, keepdim=True)) / count
