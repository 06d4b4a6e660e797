"""A landscape: the mean loss of a model over fixed data, as a function of one flat vector of parameters.

Data are kept in memory and weighted by samples, since batches may differ in size, and data between two readings. The
function is checked before its first use, since a model may draw at random, or mix the samples of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from itertools import chain
from typing import Any
from weakref import proxy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flatlab.arguments import FloatArray
from flatlab.derivatives.autograd import one_path, refuse_rounding
from flatlab.derivatives.exact import attributes_restored
from flatlab.derivatives.operators import Hessian, Term
from flatlab.errors import UserError
from flatlab.landscape.blocks import Block, Gathered, Partition, Samples, of_one_form
from flatlab.landscape.checks import (
    alike,
    data_versions,
    note_undone,
    refuse_changed,
    refuse_parametrized,
    refuse_surroundings,
    refuse_training,
    stored_quantized,
    version,
    versions,
)
from flatlab.landscape.curvature_checks import SAMPLED, check_second_derivatives
from flatlab.landscape.evaluation import Evaluation, Move
from flatlab.landscape.failures import check_loss
from flatlab.landscape.opening import Opening
from flatlab.landscape.own_loss import OwnLoss
from flatlab.seeds import generator, undisturbed
from flatlab.tensors.calls import call
from flatlab.tensors.flat import flatten, length, select, split_like, widened
from flatlab.tensors.losses import Metric, Noted, sample_losses, total, total_and_hits, totals, weight
from flatlab.tensors.memory import SplitOnOOM
from flatlab.tensors.nested import Batch, Data, join, part, read_strata, recut, same, span, spread

SOME = 64  # samples of a stratum on which a model's own loss is compared, beside the first batch


class Landscape:
    """The mean loss of ``model`` on ``data`` around its current parameters.

    The model is moved in place and restored bit by bit, also after an exception: no copy, no hook. Later changes of
    model or data are refused, except writes that torch does not count (by ``.data``, or through NumPy's memory).

    Args:
        model: any module, in eval mode; it is called as ``model(inputs)``, or, if inputs are a dictionary whose keys
            are arguments of its ``forward``, as ``model(**inputs)``. In nested outputs, leaves that are not tensors
            with a sample axis are replaced by None. A sample's outputs must not depend on the others of its batch:
            samples of one shape are joined, and cut into batches of other sizes, also if they are given one by one.
        data: ``(inputs, targets)`` batches that can be read twice, any nests of tensors; or dictionaries with an entry
            ``labels``, which becomes the targets; or a mapping from the names of strata (domains) to such batches,
            which then have equal weight whatever their sizes.
        loss: ``loss(outputs, targets)``, the mean over the samples or a vector of per-sample losses; or a pair of
            vectors, each sample's sum and its weight, whose quotient of sums is the loss (a mean over tokens); or
            `flatlab.loss_of(model)`, the loss that the model itself computes from labels.
        params: shell patterns of the parameters that vary; all that require a gradient by default.
        check: read the data twice, and check the loss as a function: its values on joined and on cut batches, its
            gradient against differences, and its Hessian before the first use. Costs 2 forward passes over the data
            (of more than 10,000 samples fewer, down to 1.1) and at most 2 more, including the backward pass of a tenth.
        batch_size: cut the data into batches of this size; the value does not depend on it.

    Raises:
        UserError: if one of the checks finds that the loss is not a function of the parameters alone.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data | Mapping[str, Data],
        loss: Metric,
        *,
        params: str | Iterable[str] | None = None,
        check: bool = True,
        batch_size: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"The model must be a torch.nn.Module, got {type(model).__name__}.")
        check_loss(loss)
        self.model, self.loss, self._check = model, loss, check
        self._forward = SplitOnOOM(model)
        self._noted = Noted(loss)
        self._total = partial(total, self._noted)
        self.named = select(model, params)
        refuse_parametrized(model, self.named)
        self._tensors: list[Tensor] = alike(self.named)
        self._w0 = widened(flatten(self._tensors))
        sources = data if isinstance(data, Mapping) else {"all": data}
        if not sources:
            raise UserError("The data must have at least one stratum, got none: pass {name: batches}.")
        with undisturbed():  # a DataLoader draws from torch's global generator each time it is read
            kept = read_strata(sources, self._w0.device, check=check)
        self.strata = tuple(str(name) for name in sources)
        self._batches = [recut(batches, batch_size) for batches in kept]
        if isinstance(loss, OwnLoss):
            with torch.no_grad():
                loss.settle([self._batches[0][0], *chain(*(_some(each) for each in self._batches))])
        self.sizes = np.array([sum(batch.size for batch in batches) for batches in self._batches])
        self._state = versions(model, self._tensors)
        self._data_state = data_versions(self._batches)
        self._base: FloatArray | None = None
        self._samples: Samples | None = None
        self._hessian: Hessian | None = None
        self._weights: FloatArray | None = None
        self._curved = not check
        self.remarks = tuple[str, ...]()
        if check:
            self._open()

    @property
    def point(self) -> Tensor:
        """A copy of the parameters (P,) around which the landscape lies; in float32 if they have 16 bits."""
        return self._w0.clone()

    @property
    def parts(self) -> list[Tensor]:
        """Views of the point with the shapes of the parameters, not to be written to."""
        return self.split(self._w0)

    @property
    def num_params(self) -> int:
        """The number of parameters, P."""
        return self._w0.numel()

    @property
    def device(self) -> torch.device:
        """The device of the parameters, and of the data."""
        return self._w0.device

    @property
    def num_samples(self) -> int:
        """The number of samples in one pass over the data."""
        return sum(batch.size for batch in chain.from_iterable(self._batches))

    @property
    def norm(self) -> float:
        """The Euclidean length of the point."""
        return float(length(self._w0))

    @property
    def resolution(self) -> float:
        """Spacing of adjacent values of the loss at the point, in the dtype in which the loss is computed."""
        largest = np.abs(self.base_loss).max()  # first: the loss is then computed
        return float(largest * self._noted.spacing)

    @property
    def base_loss(self) -> FloatArray:
        """Mean loss (S,) of each stratum at the point itself, computed once."""
        if self._base is None:
            self._base = self.evaluate().losses
            self._base.flags.writeable = False
        return self._base

    @property
    def weights(self) -> FloatArray:
        """Sums (S,) of the samples' weights in each stratum, which are their numbers if the loss gives no weights."""
        if self._weights is None:
            self._weights = self._weigh(self.loss)
        return self._weights

    @property
    def weighs_samples(self) -> bool:
        """Whether the loss returns a pair (sums, weights), so that samples have unequal weight."""
        first = spread(self._batches[0], 1)[0]
        with self._visiting(), torch.no_grad():
            return weight(self.loss, self._forward(first.inputs), first) is not None

    def as_point(self, vector: Tensor) -> Tensor:
        """Return a flat vector (P,) in the dtype and on the device of the point."""
        if vector.shape != self._w0.shape:
            raise UserError(
                f"A point of this landscape must be one flat vector of shape ({self.num_params},), got"
                f" {tuple(vector.shape)}."
            )
        return vector.to(self._w0)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a flat vector (P,) with the shapes of the parameters."""
        return split_like(vector, self._tensors)

    def evaluate(self, vector: Tensor | None = None) -> Evaluation:
        """Return loss and accuracy at a flat vector (P,), by default at the point itself."""
        weights = self.weights
        with self._visiting(vector), torch.no_grad():
            sums = self._sums(partial(total_and_hits, self._noted)).cpu().double().numpy()
        losses, accuracies = sums[:, 0] / weights, sums[:, 1] / sums[:, 2]
        known = not np.isnan(accuracies).any()
        shares = accuracies if known else None
        return Evaluation(float(losses.mean()), float(accuracies.mean()) if known else None, losses, shares)

    def around(self, model: nn.Module, *, check: bool = True) -> "Landscape":
        """Return the landscape of the same data and loss around another model, of the same choice of parameters."""
        data = {name: [batch[:2] for batch in each] for name, each in zip(self.strata, self._batches, strict=True)}
        loss = OwnLoss(model) if isinstance(self.loss, OwnLoss) else self.loss
        other = Landscape(model, data, loss, params=list(self.named), check=check and self._check)
        other.refuse_foreign(self)
        return other

    @contextmanager
    def moving(self, *metrics: Metric, settle: Callable[[], object] = lambda: None) -> Iterator[Move]:
        """Yield ``at(direction, radius=1.0)``: stratum losses (S,) at point + radius * direction, for many points.

        A point costs one pass over the parameters to compute and one to copy. They are copied into the model's
        own tensors, not replaced by views of one flat vector, since a ``channels_last`` network is up to 1.5 times
        slower with row-major kernels. Several radii at once (..., S) synchronise with the device once. With `metrics`,
        functions of the loss's form, their means (..., S, M) are returned instead. `settle` is called at each point.
        """
        flat = torch.empty_like(self._w0)
        measured = partial(totals, metrics) if metrics else self._total
        sizes = np.stack([self._weigh(each) for each in metrics], axis=1) if metrics else self.weights
        views = self.split(flat)

        @torch.no_grad()
        def at(direction: Tensor, radius: npt.ArrayLike = 1.0, *, block: Gathered | None = None) -> FloatArray:
            sums = []
            for each in np.ravel(radius).tolist():
                torch.add(self._w0, direction, alpha=each, out=flat)
                torch._foreach_copy_(self._tensors, views)
                settle()
                sums.append(self._sums(measured) if block is None else self._totals(*block))
            table = torch.stack(sums).cpu().double().numpy()
            means = table / sizes if block is None else block.block.shares(table)
            return means.reshape(*np.shape(radius), *means.shape[1:])

        with self._visiting():
            yield at

    def blocks(self, block_size: int, *, seed: int = 0) -> Partition:
        """Return a partition of the samples into blocks of about `block_size`, each with its share of each stratum."""
        rng = generator("landscape", "blocks", block_size, seed)
        return Partition(self.sizes.tolist(), block_size, generator=rng, weights=self.weights.tolist())

    @property
    def joinable(self) -> bool:
        """Whether samples of several batches can share a block, since all have one shape."""
        return self._store().alike

    def gather(self, block: Block) -> Gathered:
        """Return a block's samples, to be evaluated at several points."""
        batch = self._store().pick(block.rows)
        cut = [Batch(None, part(batch.targets, p.start, p.stop), p.stop - p.start) for p in block.parts]
        return Gathered(batch, block, cut)

    def on(self, block: Block) -> "Landscape":
        """Return the landscape of a block, around the same point; the mean of those of a partition is the landscape."""
        other, whole = copy(self), self.gather(block).batch
        other._batches = [[span(whole, p.start, p.stop)] for p in block.parts]
        other._data_state = data_versions(other._batches)
        other._base = other._samples = other._hessian = None
        other.sizes = other._weights = np.array([1 / p.scale for p in block.parts])  # divisors of the totals
        return other

    def shares_data(self, other: "Landscape") -> bool:
        """Return whether another landscape has the same samples, in batches of any size."""
        pairs = zip(self._batches, other._batches, strict=False)
        return self.strata == other.strata and all(same(ours, theirs) for ours, theirs in pairs)

    def shares_loss(self, other: "Landscape") -> bool:
        """Return whether another landscape has the same loss at its point if our loss function is used: one pass."""
        if isinstance(self.loss, OwnLoss) and isinstance(other.loss, OwnLoss):
            return self.loss.kind == other.loss.kind
        if self.loss is other.loss or isinstance(self.loss, OwnLoss) or isinstance(other.loss, OwnLoss):
            return self.loss is other.loss
        swapped = copy(other)
        swapped.loss, swapped._noted, swapped._total = self.loss, self._noted, self._total
        swapped._base = swapped._weights = None
        return bool(np.allclose(swapped.base_loss, other.base_loss, rtol=1e-5, atol=0.0, equal_nan=True))

    def refuse_foreign(self, other: "Landscape") -> None:
        """Refuse a loss that reads the parameters of another landscape's model, such as a penalty written for it."""
        own = {id(each) for each in self.model.parameters()}
        theirs = [each for each in other._tensors if id(each) not in own and each.requires_grad]
        first = spread(self._batches[0], 1)[0]
        found: tuple[Tensor | None, ...] = ()
        with suppress(RuntimeError), self._visiting(), torch.enable_grad():  # values need no gradient
            value = self._total(call(self.model, first.inputs), first)
            found = torch.autograd.grad(value, theirs, allow_unused=True) if theirs and value.requires_grad else ()
        if any(each is not None for each in found):
            raise UserError(
                "The loss reads the parameters of the model it was written for (a penalty), also for the other model:"
                " leave that term out of the loss."
            )

    def gradient(self, vector: Tensor | None = None) -> Tensor:
        """Return the gradient (P,) of the loss at a flat vector, by default at the point itself."""
        result, terms = torch.zeros_like(self._w0), self.terms()
        with self._visiting(vector), torch.enable_grad():
            for inputs, total, count in terms:
                loss = total(call(self.model, inputs)) / count
                if loss.requires_grad:  # else it does not depend on the parameters
                    result += flatten(torch.autograd.grad(loss, self._tensors, materialize_grads=True))
        return result

    def hvp(self, vector: Tensor) -> Tensor:
        """Return the Hessian of the loss at the point times a vector (P,), by `Hessian`.

        Raises:
            UserError: if the model cannot be differentiated twice, or rounds its weights.
        """
        direction = self.as_point(vector)
        self._hessian = self._hessian or Hessian(proxy(self))  # self would be a reference cycle, which keeps the graph
        return self._hessian @ direction

    def check_curvature(self) -> None:
        """Refuse rounded weights, and, by one check on a few samples, second derivatives that are wrong."""
        refuse_rounding(self.model, self._tensors)
        if not self._curved:
            few = [spread(batches, max(1, SAMPLED // len(self.strata))) for batches in self._batches]
            check_second_derivatives(self.model, self.named, list(chain(*few)), self._total)
        self._curved = True

    def terms(self) -> list[Term]:
        """Return the batches: the loss is the sum of ``total(outputs) / count`` over them."""
        self._refuse_changed()
        return list(self._terms())

    @contextmanager
    def _visiting(self, vector: Tensor | None = None) -> Iterator[None]:
        self._refuse_changed()
        before = [version(tensor) for tensor in self._tensors]
        with attributes_restored(self.model), one_path():
            try:
                if vector is not None:
                    self._put(self.as_point(vector))
                yield
            finally:
                self._put(self._w0)
                note_undone(self._tensors, before)

    def _store(self) -> Samples:
        if self._samples is None:
            self._samples = Samples(self._batches)
        return self._samples

    def _weigh(self, metric: Metric) -> FloatArray:
        first = spread(self._batches[0], 1)[0]
        with self._visiting(), torch.no_grad():
            plain = weight(metric, self._forward(first.inputs), first) is None
            return self.sizes.astype(float) if plain else self._sums(partial(weight, metric)).cpu().double().numpy()

    def _open(self) -> None:
        of_loss = self._total, partial(weight, self.loss), partial(sample_losses, self.loss)
        looks = self._forward, *of_loss, self._visiting
        opening = Opening(self.model, self.named, self._state, self.strata, self._batches, *looks)
        sums, self._weights = opening.values()
        self._base = sums / self._weights
        self._base.flags.writeable = False
        own = self.loss.remark if isinstance(self.loss, OwnLoss) else ""
        self.remarks = tuple(each for each in (own, stored_quantized(self.model), *opening.slopes(sums)) if each)

    def _put(self, vector: Tensor) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self.split(vector))

    def _sums(self, total: Callable[[Any, Batch], Any]) -> Tensor:
        sums = [torch.stack([total(self._forward(b.inputs), b) for b in each]).sum(0) for each in self._batches]
        return torch.stack(sums)

    def _totals(self, batch: Batch, block: Block, targets: list[Batch]) -> Tensor:
        """Return the total loss of each part of a block, or of each sample where that is one call of the same mean."""
        outputs = self._forward(batch.inputs)
        mean = self._check or len(block.parts) == block.size  # unchecked, it may have been that of some samples alone
        if mean and (found := sample_losses(self.loss, outputs, batch.targets)) is not None:
            return found
        pairs = zip(block.parts, targets, strict=True)
        return torch.stack([self._total(part(outputs, p.start, p.stop), each) for p, each in pairs])

    def _terms(self) -> Iterator[Term]:
        for batches, each in zip(self._batches, self.weights.tolist(), strict=True):
            yield from ((b.inputs, partial(self._total, batch=b), each * len(self.strata)) for b in batches)

    def _refuse_changed(self) -> None:
        refuse_surroundings(self.device)
        refuse_changed(self.model, self._tensors, self._w0, self._state)
        if data_versions(self._batches) != self._data_state:
            raise UserError("The data have been written to since the landscape was built: build a new Landscape.")
        if self._check:
            refuse_training(self.model)


def _some(batches: Sequence[Batch]) -> list[Batch]:
    """Return samples of several batches, joined if their shapes allow it: batches may be sorted by class."""
    few = spread(batches, SOME)
    return [join(few)] if of_one_form(few) else few
