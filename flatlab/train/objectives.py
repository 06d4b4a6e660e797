"""Objectives: functions from a network and a batch to a scalar loss in nats."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from flatlab.data.batches import Batch
from flatlab.models import Network

Objective = Callable[[Network, Batch], Tensor]


def erm(network: Network, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the batch: all source domains' images, concatenated."""
    return F.cross_entropy(network(batch.inputs).float(), batch.targets)  # of bf16 logits too


OBJECTIVES: dict[str, Objective] = {"erm": erm}
