"""Sums of a loss over a batch, whatever form the loss function gives it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatlab.errors import UserError
from flatlab.nests import Batch

Metric = Callable[[Any, Any], Tensor]
"""From outputs and targets to a mean over the samples, or to one number for each of them, as losses are."""
CLASSES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def total(loss: Metric, outputs: Any, batch: Batch) -> Tensor:
    """Return the sum of the losses over a batch, a float64 scalar.

    Args:
        loss: gives the mean over the samples, or a vector of per-sample losses.
        outputs: of the model.
        batch: whose targets they are held against.

    Raises:
        UserError: where the loss gives neither.
    """
    value = loss(outputs, batch.targets)
    if isinstance(value, Tensor) and value.ndim == 0:
        return value.to(wide(value)) * batch.size
    if isinstance(value, Tensor) and value.shape == (batch.size,):
        return value.sum(dtype=wide(value))
    came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"The loss must be a tensor of shape () or, one loss per sample, ({batch.size},), but {came} came:"
        " average it over its other dimensions."
    )


def totals(metrics: Sequence[Metric], outputs: Any, batch: Batch) -> Tensor:
    """Return the sums (M,) of several metrics over a batch."""
    return torch.stack([total(metric, outputs, batch) for metric in metrics])


def total_and_hits(loss: Metric, outputs: Any, batch: Batch) -> Tensor:
    """Return the sum of the losses, and how many samples are classified right; NaN where there are no classes."""
    summed = total(loss, outputs, batch)
    hits = outputs.argmax(1) == batch.targets if names_classes(outputs, batch) else summed.new_tensor(math.nan)
    return torch.stack([summed, hits.sum(dtype=summed.dtype)])


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums: float64 where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def names_classes(outputs: Any, batch: Batch) -> bool:
    """Say whether outputs (n, C) score classes that targets (n,) name, so that there is an accuracy."""
    scores = isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.ndim == 2
    names = isinstance(batch.targets, Tensor) and batch.targets.dtype in CLASSES
    return scores and names and outputs.shape[1] > 1 and batch.targets.shape == (batch.size,)
