"""Curvature as a linear operator: the Hessian of a landscape's loss, and the base class of such operators.

Derivatives are by the model's own parameters, so that a loss that reads them, such as an L2 penalty, is differentiated
as a whole. The graph of a single batch is kept between products, since it takes no more memory than the product itself;
of several batches only one graph exists at a time, shared by a block of vectors.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from flatlab.derivatives.autograd import Apply, Whole, pullback, second_order
from flatlab.derivatives.batchnorm_folding import Folds, find_folds
from flatlab.derivatives.differentiation import Choice, dual_numbers, measure, tangent_of
from flatlab.derivatives.double_backward import DoubleBackward
from flatlab.derivatives.exact import exact_derivatives, uses_inexact
from flatlab.errors import UserError, choose
from flatlab.seeds import generator
from flatlab.tensors.flat import flatten, widened
from flatlab.tensors.nested import part, tensors
from flatlab.tensors.structures import mapped

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Method = Literal["auto", "reverse", "forward"]
Term = tuple[Any, Callable[[Any], Tensor], float]
"""Inputs of a batch; the function from its outputs to the sum of its losses; the divisor of that sum in the loss."""
TRIED = 8  # samples on which it is determined what can be folded


class Around(Protocol):
    """What an operator needs of a landscape: a sum of terms around a point, the values of the model's parameters."""

    @property
    def model(self) -> nn.Module: ...  # noqa: D102
    @property
    def named(self) -> dict[str, nn.Parameter]: ...  # noqa: D102
    @property
    def num_params(self) -> int: ...  # noqa: D102
    @property
    def point(self) -> Tensor: ...  # noqa: D102
    @property
    def weighs_samples(self) -> bool: ...  # noqa: D102
    def split(self, vector: Tensor) -> list[Tensor]: ...  # noqa: D102
    def terms(self) -> list[Term]: ...  # noqa: D102
    def check_curvature(self) -> None: ...  # noqa: D102


class Curvature(ABC):
    """A symmetric matrix (P, P), given by its products with vectors; ``@`` takes (P,) and (P, k).

    Batches are weighted by their size, strata equally. 16-bit weights are differentiated as copies in float32. Memory
    beyond the model: the graph of one batch, and about four vectors (P,) during a product.

    Args:
        landscape: gives model, data, loss and the parameters that vary.
        method: "reverse" differentiates twice backwards, "forward" once forwards over backwards, which needs less
            memory; "auto" is the faster one that works, by a trial on one batch.
        fold: fold BatchNorm into the layer directly before it: exact, and faster.

    Raises:
        UserError: if the model cannot be differentiated twice, or rounds its weights.
    """

    name = "curvature matrix"

    def __init__(self, landscape: Around, *, method: Method = "auto", fold: bool = True) -> None:
        if not hasattr(landscape, "terms"):
            raise UserError(
                f"{type(self).__name__}: landscape must be a Landscape, got {type(landscape).__name__}: build"
                " Landscape(model, data, loss) first."
            )
        self.landscape = landscape
        _refuse_parallel(landscape.model)
        landscape.check_curvature()
        self.shape = (landscape.num_params, landscape.num_params)
        self.products = 0
        self.watch: Callable[[int], None] | None = None  # called with `products` after each block of them
        self._whole = Whole(landscape.model)
        self._named = {name: _precise(p) for name, p in landscape.named.items()}
        self._tensors: list[Tensor] = list(self._named.values())
        chosen = {id(p) for p in landscape.named.values()}
        # What does not vary is detached: the derivatives of a head alone keep no graph of the features.
        self._fixed = {n: widened(p.detach()) for n, p in landscape.model.named_parameters() if id(p) not in chosen}
        self._wide = any(p is not q for p, q in zip(self._tensors, landscape.named.values(), strict=True))
        if self._wide:
            self._fixed |= {name: widened(buffer) for name, buffer in landscape.model.named_buffers()} | self._named
        self._folds, self._inexact = Folds(), False
        self._kept: tuple[list[int], Apply] | None = None
        self._look(fold)
        self._choice = self._choose(choose("method", method, ("auto", "reverse", "forward")))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, in which products are computed."""
        return self._tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._tensors[0].device

    @property
    def method(self) -> str:
        """How single vectors are multiplied: "reverse" or "forward"."""
        return self._choice.method(1)

    @property
    def reason(self) -> str:
        """Why that method was chosen."""
        return self._choice.reason

    @property
    def folding(self) -> str:
        """The number of folded BatchNorm layers, and why not all are folded, as text."""
        return self._folds.reason

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.ndim not in (1, 2) or len(vectors) != self.shape[1]:
            raise UserError(
                f"The {self.name} multiplies vectors of shape ({self.shape[1]},) or blocks ({self.shape[1]}, k), got"
                f" {tuple(vectors.shape)}."
            )
        rows = vectors.detach().to(self._tensors[0]).reshape(len(vectors), -1).T.contiguous()
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
        """Return the operator on NumPy vectors, for scipy.sparse.linalg; products are copied to and from the host."""
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
        """Return a batch's part of the product as a function of views, from a graph that many vectors share."""

    @abstractmethod
    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return a batch's part of one product by forward mode, which keeps no graph."""

    def _outputs(
        self, inputs: Any, replaced: dict[str, Tensor] | None = None, finish: Callable[[Any], Any] = lambda x: x
    ) -> Any:
        """Return `finish(outputs)`, with the model's own parameters or with others in their place."""
        given = {f"model.{name}": tensor for name, tensor in (self._fixed | (replaced or {})).items()}
        passed = mapped(lambda leaf: None if leaf is None else widened(leaf), inputs) if self._wide else inputs
        return functional_call(self._whole, given, (passed, finish))

    @contextmanager
    def _differentiating(self) -> Iterator[None]:
        with second_order(), exact_derivatives(self.landscape.model, inexact=self._inexact), self._folds.applied():
            yield

    def _look(self, fold: bool) -> None:
        """Determine on a few samples which layers can be folded, and whether functions must be replaced."""
        inputs, model = part(self.landscape.terms()[0][0], 0, TRIED), self.landscape.model
        with exact_derivatives(model, inexact=False):
            self._inexact = uses_inexact(tensors(self._outputs(inputs)))
        if fold:
            with self._differentiating():
                self._folds = find_folds(model, lambda: self._outputs(inputs))

    def _apply(self, term: Term, width: int) -> Apply:
        if self._choice.method(width) == "forward" and self._kept is None:
            return lambda views: self._forward(term, views)
        if not self._single:
            return self._reverse(term)
        here = [tensor._version for tensor in self._tensors]  # a graph is invalid once its parameters are written to
        if self._kept is None or self._kept[0] != here:
            self._kept = None  # before the next is built
            self._kept = here, self._reverse(term)
        return self._kept[1]

    def _reverse(self, term: Term) -> Apply:
        with DoubleBackward():
            apply = self._graph(term)

        def product(views: Sequence[Tensor]) -> Sequence[Tensor]:
            with DoubleBackward():  # checkpointed layers run once more
                return apply(views)

        return product

    def _choose(self, method: str) -> Choice:
        """Try the methods on one batch; keep its graph if there is no other batch and backwards is chosen."""
        terms = self.landscape.terms()
        self._single = len(terms) == 1
        vector = torch.randn(self.shape[0], generator=generator("operators", "probe")).to(self.landscape.point)
        with self._differentiating():
            choice, graph = measure(
                lambda: self._reverse(terms[0]),
                lambda views: self._forward(terms[0], views),
                self.landscape.split(vector),
                method=method,
                single=self._single,
            )
        if choice.failure:
            raise UserError(f"The model cannot be differentiated twice, so it has no {self.name}: {choice.failure}")
        if graph is not None and self._single and choice.method(1) == "reverse":
            self._kept = [tensor._version for tensor in self._tensors], graph
        return choice


class Hessian(Curvature):
    """The matrix of second derivatives of the mean loss, in nats per squared unit of the parameters.

    Autograd ignores the curvature at the kinks of ReLU: this is the Hessian almost everywhere.
    """

    name = "Hessian"

    def _graph(self, term: Term) -> Apply:
        inputs, total, count = term
        loss = self._outputs(inputs, finish=total) / count
        grads = torch.autograd.grad(loss, self._tensors, create_graph=True, materialize_grads=True)
        return pullback(grads, self._tensors)

    def _forward(self, term: Term, views: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs, total, count = term
        with dual_numbers(self._named, views) as duals:
            loss = self._outputs(inputs, duals, total) / count
            grads = torch.autograd.grad(loss, list(duals.values()), materialize_grads=True)
            tangents = [tangent_of(grad) for grad in grads]
        return [torch.zeros_like(v) if t is None else t for t, v in zip(tangents, views, strict=True)]


def _precise(weight: Tensor) -> Tensor:
    """Return a weight, or its copy in float32 if it has 16 bits, whose second derivatives would be noise."""
    wide = widened(weight)
    return weight if wide is weight else wide.detach().requires_grad_()


def _refuse_parallel(model: nn.Module) -> None:
    """Refuse replicas on several devices: they are created in each pass, and do not share the parameters."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UserError(
                f"Curvature needs a model on one device, but {name or 'the model'} is a DataParallel on"
                f" {len(module.device_ids)}: pass its `.module`."
            )
