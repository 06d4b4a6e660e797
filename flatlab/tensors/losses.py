"""Sums of a loss over a batch, for each form of loss function."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab.errors import UserError
from flatlab.tensors.nested import Batch

Metric = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor]]
"""From outputs and targets to a mean over the samples, to one number for each of them, or to a pair of vectors: each
sample's sum and its weight; the mean is then the sum of the sums over the sum of the weights (a mean over tokens)."""
CLASSES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Noted:
    """A loss function that notes the largest relative spacing of its values' and its outputs' dtypes.

    A model that computes in 16 bits inside (autocast) returns them, whatever the dtype of the loss.
    """

    def __init__(self, loss: Metric) -> None:
        self.loss, self.spacing = loss, 0.0

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Return the loss's value."""
        value = self.loss(outputs, targets)
        for each in (outputs, value[0] if isinstance(value, tuple) else value):
            if isinstance(each, Tensor) and each.is_floating_point():
                self.spacing = max(self.spacing, torch.finfo(each.dtype).eps)
        return value


def total(loss: Metric, outputs: Any, batch: Batch) -> Tensor:
    """Return the sum of the losses over a batch, a float64 scalar.

    Args:
        loss: gives the mean over the samples, a vector of per-sample losses, or a pair of per-sample sums and weights.
        outputs: of the model.
        batch: whose targets they are compared with.

    Raises:
        UserError: if the loss returns none of these.
    """
    return _summed(loss(outputs, batch.targets), batch)


def _summed(value: Any, batch: Batch) -> Tensor:
    """Return the sum of the losses over a batch, from the loss function's value."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.double() * batch.size
    sums = value[0] if _is_pair(value) else value
    if isinstance(sums, Tensor) and sums.shape == (batch.size,):
        return sums.sum(dtype=torch.float64)
    got = f"shape {tuple(sums.shape)}" if isinstance(sums, Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"The loss must be a tensor of shape () or, one loss per sample, ({batch.size},), got {got}: sum it over its"
        " other dimensions and return the pair (sums, weights), where the weight of a sample is the number of counted"
        " terms, such as (targets != -100).sum(1); or average it over them, if all samples have equal weight."
    )


def sample_losses(loss: Metric, outputs: Any, targets: Any) -> Tensor | None:
    """Return the loss of each sample (n,) in one call, if the loss is torch's plain cross-entropy of class scores."""
    scores = isinstance(outputs, Tensor) and outputs.ndim == 2
    if not (scores and isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64):
        return None
    if loss is F.cross_entropy:
        return F.cross_entropy(outputs, targets, reduction="none")
    if type(loss) is nn.CrossEntropyLoss and (loss.weight, loss.reduction, loss.ignore_index) == (None, "mean", -100):
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=loss.label_smoothing)
    return None


def weight(loss: Metric, outputs: Any, batch: Batch) -> Tensor | None:
    """Return the sum of the weights of a batch's samples; None if the loss weighs all samples equally."""
    value = loss(outputs, batch.targets)
    if not _is_pair(value):
        return None
    weights = value[1]
    if not isinstance(weights, Tensor) or weights.shape != (batch.size,) or weights.requires_grad:
        got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
        raise UserError(
            f"The weights of a loss must have shape ({batch.size},) and not depend on the parameters, got {got}:"
            " compute them from the targets, as (targets != -100).sum(1)."
        )
    return weights.sum(dtype=torch.float64)


def _is_pair(value: Any) -> TypeGuard[tuple[Any, Any]]:
    return isinstance(value, tuple) and len(value) == 2


def totals(metrics: Sequence[Metric], outputs: Any, batch: Batch) -> Tensor:
    """Return the sums (M,) of several metrics over a batch."""
    return torch.stack([total(metric, outputs, batch) for metric in metrics])


def total_and_hits(loss: Metric, outputs: Any, batch: Batch) -> Tensor:
    """Return the sum of the losses, the number of correctly classified samples (NaN without classes), and of samples.

    Samples to which the loss gives weight 0 are not counted.
    """
    value = loss(outputs, batch.targets)
    summed = _summed(value, batch)
    counted = value[1] != 0 if _is_pair(value) else summed.new_ones(batch.size)
    if not names_classes(outputs, batch):
        return torch.stack([summed, summed.new_tensor(math.nan), counted.sum(dtype=summed.dtype)])
    hits = (outputs.argmax(1) == batch.targets) & (counted != 0)
    return torch.stack([summed, hits.sum(dtype=summed.dtype), counted.sum(dtype=summed.dtype)])


def names_classes(outputs: Any, batch: Batch) -> bool:
    """Whether outputs (n, C) are scores of the classes in targets (n,), so that an accuracy is defined."""
    scores = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 2
    names = isinstance(batch.targets, Tensor) and batch.targets.dtype in CLASSES
    return scores and names and outputs.shape[1] > 1 and batch.targets.shape == (batch.size,)
