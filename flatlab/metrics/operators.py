"""Curvature as a linear operator: the Hessian, the Gauss-Newton matrix and the Fisher matrix of a landscape's loss.

A product never touches the model: it is called with private copies of the parameters (torch.func.functional_call), so
that the graph of a gradient can outlive a product. One batch's graph is kept between products, since it costs no more
memory than the product itself holds; of several batches only one graph exists at a time, shared by a block of vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from flatlab.derivatives import Apply, pullback, refuse_rounding, second_order
from flatlab.errors import UserError, choose
from flatlab.landscape import Landscape, Term
from flatlab.metrics.folding import Folds, find_folds
from flatlab.metrics.modes import Choice, dual_numbers, measure, tangent_of
from flatlab.nests import part
from flatlab.params import flatten
from flatlab.seeds import generator

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Method = Literal["auto", "reverse", "forward"]
PROBED = 8  # samples on which is seen what can be folded


class Curvature(ABC):
    """A symmetric matrix (P, P) that is known by its products with vectors; ``@`` takes (P,) and (P, k).

    Batches weigh by their size, strata equally. Memory beyond the model: one copy of the parameters, the graph of one
    batch, and about four vectors (P,) during a product.

    Args:
        landscape: of which model, data, loss and choice of parameters are taken.
        method: "reverse" differentiates twice backwards, "forward" once forwards over backwards, which needs less
            memory; "auto" tries one batch: the faster that works.
        fold: fold BatchNorm into the layer before it, where it directly follows one: exact, and faster.

    Raises:
        UserError: where the model cannot be differentiated twice, or rounds its weights.
    """

    name = "curvature matrix"

    def __init__(self, landscape: Landscape, *, method: Method = "auto", fold: bool = True) -> None:
        self.landscape = landscape
        refuse_rounding(landscape.model, landscape.named.values())
        self.shape = (landscape.num_params, landscape.num_params)
        self.products = 0
        self.watch: Callable[[int], None] | None = None  # called with `products` after each block of them
        chosen = {id(p) for p in landscape.named.values()}
        # What does not vary is detached: the derivatives of a head alone keep no graph of the features.
        self._fixed = {n: p.detach() for n, p in landscape.model.named_parameters() if id(p) not in chosen}
        self._copies = {name: p.detach().clone().requires_grad_() for name, p in landscape.named.items()}
        self._folds = self._find_folds() if fold else Folds()
        self._kept: Apply | None = None
        self._choice = self._choose(choose("method", method, ("auto", "reverse", "forward")))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which products are computed."""
        return next(iter(self._copies.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self._copies.values())).device

    @property
    def method(self) -> str:
        """How single vectors are multiplied: "reverse" or "forward"."""
        return self._choice.method(1)

    @property
    def reason(self) -> str:
        """Why that method was taken."""
        return self._choice.reason

    @property
    def folding(self) -> str:
        """How many BatchNorm layers are folded, and why not all."""
        return self._folds.reason

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.ndim not in (1, 2) or len(vectors) != self.shape[1]:
            raise UserError(
                f"The {self.name} multiplies vectors of shape ({self.shape[1]},) or blocks ({self.shape[1]}, k), but"
                f" {tuple(vectors.shape)} came."
            )
        rows = vectors.detach().to(self._copies[next(iter(self._copies))]).reshape(len(vectors), -1).T.contiguous()
        result = torch.zeros_like(rows)
        with self._differentiating():
            for term in self.landscape.terms():
                apply = self._apply(term, len(rows))
                for row, total in zip(rows, result, strict=True):
                    total += flatten(apply(self.landscape.split(row)))
        self.products += len(rows)
        if self.watch:
            self.watch(self.products)
        if not torch.isfinite(result).all():
            raise UserError(
                f"A product of the {self.name} with a vector is not finite: the loss or its derivatives overflow at"
                " this point, so no curvature is defined."
            )
        return result[0] if vectors.ndim == 1 else result.T

    def to_scipy(self) -> "LinearOperator":
        """Return the operator on NumPy vectors, for scipy.sparse.linalg; each product crosses to the host and back."""
        from scipy.sparse.linalg import LinearOperator

        dtype = np.float64 if self.dtype == torch.float64 else np.float32

        def product(vectors: Any) -> Any:
            return (self @ torch.as_tensor(np.ascontiguousarray(vectors))).cpu().numpy().astype(dtype)

        return LinearOperator(
            self.shape,
            matvec=lambda v: product(v.ravel()),
            rmatvec=lambda v: product(v.ravel()),
            matmat=product,
            rmatmat=product,
            dtype=dtype,
        )

    @abstractmethod
    def _graph(self, term: Term) -> Apply:
        """Return a batch's share of the product as a function of views, from a graph that serves many vectors."""

    @abstractmethod
    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return a batch's share of one product by forward mode, which keeps no graph."""

    def _outputs(self, inputs: Any, parameters: dict[str, Tensor]) -> Any:
        return functional_call(self.landscape.model, {**self._fixed, **parameters}, (inputs,))

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with second_order(), self._folds.applied():
            yield

    def _find_folds(self) -> Folds:
        inputs = part(self.landscape.terms()[0][0], 0, PROBED)
        with torch.enable_grad():
            return find_folds(self.landscape.model, lambda: self._outputs(inputs, self._copies))

    def _apply(self, term: Term, width: int) -> Apply:
        if self._kept is not None:
            return self._kept
        if self._choice.method(width) == "forward":
            return lambda views: self._forward(term, views)
        return self._graph(term)

    def _choose(self, method: str) -> Choice:
        """Try the methods on one batch; keep its graph where there is no other batch and backwards is right."""
        terms = self.landscape.terms()
        probe = torch.randn(self.shape[0], generator=generator("operators", "probe")).to(self.landscape.point)
        with self._differentiating():
            choice, graph = measure(
                lambda: self._graph(terms[0]),
                lambda views: self._forward(terms[0], views),
                self.landscape.split(probe),
                method=method,
                single=len(terms) == 1,
            )
        if choice.failure:
            raise UserError(f"The model cannot be differentiated twice, so it has no {self.name}: {choice.failure}")
        self._kept = graph if len(terms) == 1 and choice.method(1) == "reverse" else None
        return choice


class Hessian(Curvature):
    """The matrix of second derivatives of the mean loss, in nats per squared unit of the parameters.

    The kinks of ReLU have no curvature that autograd sees: this is the Hessian almost everywhere.
    """

    name = "Hessian"

    def _graph(self, term: Term) -> Apply:
        inputs, total, count = term
        tensors = list(self._copies.values())
        loss = total(self._outputs(inputs, self._copies)) / count
        grads = torch.autograd.grad(loss, tensors, create_graph=True, materialize_grads=True)
        return pullback(grads, tensors)

    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs, total, count = term
        with dual_numbers(self._copies, views) as duals:
            loss = total(self._outputs(inputs, duals)) / count
            grads = torch.autograd.grad(loss, list(duals.values()), materialize_grads=True)
            tangents = [tangent_of(grad) for grad in grads]
        return [torch.zeros_like(v) if t is None else t for t, v in zip(tangents, views, strict=True)]


class _OuterProduct(Curvature):
    """J' M J, with J the Jacobian of the outputs and M a matrix on them, block-diagonal over samples."""

    @abstractmethod
    def _middle(self, outputs: Tensor, total: Callable[[Any], Tensor], count: float) -> Callable[[Tensor], Tensor]:
        """Return M as a function of a vector with the shape of the outputs."""

    def _graph(self, term: Term) -> Apply:
        inputs, total, count = term
        tensors = list(self._copies.values())
        outputs = self._tensor(self._outputs(inputs, self._copies))
        middle = self._middle(outputs.detach(), total, count)
        # The derivative of J'u by u, applied to v, is J v: two backward passes make a forward one.
        u = torch.zeros_like(outputs, requires_grad=True)
        pushed = pullback(torch.autograd.grad(outputs, tensors, u, create_graph=True, materialize_grads=True), [u])

        def apply(views: Sequence[Tensor]) -> Sequence[Tensor]:
            back = middle(pushed(views)[0])
            return torch.autograd.grad(outputs, tensors, back, retain_graph=True, materialize_grads=True)

        return apply

    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs, total, count = term
        with dual_numbers(self._copies, views) as duals:
            outputs = self._tensor(self._outputs(inputs, duals))
            tangent = tangent_of(outputs)
        if tangent is None:
            return [torch.zeros_like(v) for v in views]
        back = self._middle(outputs.detach(), total, count)(tangent.detach())
        return torch.autograd.grad(outputs, list(self._copies.values()), back, materialize_grads=True)

    def _tensor(self, outputs: Any) -> Tensor:
        if isinstance(outputs, Tensor):
            return outputs
        raise UserError(f"The {self.name} needs a model that returns one tensor, but a {type(outputs).__name__} came.")


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
    """

    name = "Fisher matrix"

    def __init__(
        self,
        landscape: Landscape,
        *,
        kind: Literal["expected", "empirical"] = "expected",
        method: Method = "auto",
        fold: bool = True,
    ) -> None:
        self.kind = choose("kind of Fisher matrix", kind, ("expected", "empirical"))
        super().__init__(landscape, method=method, fold=fold)

    def _middle(self, outputs: Tensor, total: Callable[[Any], Tensor], count: float) -> Callable[[Tensor], Tensor]:
        if self.kind == "empirical":
            z = outputs.requires_grad_()
            (slope,) = torch.autograd.grad(total(z), [z])
            axes = tuple(range(1, slope.ndim))
            return lambda u: slope * ((slope * u).sum(axes, keepdim=True) if axes else slope * u) / count
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise UserError(
                f"The expected Fisher matrix needs logits of shape (n, C), but outputs {tuple(outputs.shape)} came:"
                ' take kind="empirical" or GGN.'
            )
        shares = outputs.softmax(1)
        return lambda u: shares * (u - (shares * u).sum(1, keepdim=True)) / count
