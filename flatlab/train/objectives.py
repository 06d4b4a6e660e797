"""Objectives: functions from a network, a batch and its step to a scalar loss in nats."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from flatlab.data.batches import Batch
from flatlab.errors import UserError
from flatlab.models.networks import STAGES, Network
from flatlab.specs.run import RunSpec
from flatlab.train.mixstyle import mixing

Objective = Callable[[Network, Batch, int], Tensor]


def objective_of(spec: RunSpec) -> Objective:
    """Return the objective that a spec names; with MixStyle, draws are functions of the step, as batches are."""
    loss = partial(coral, weight=spec.coral_weight) if spec.objective == "coral" else erm
    mix, stages = spec.mixing, STAGES.get(spec.model, ())
    if mix and not stages:
        raise UserError(f"MixStyle mixes images, got the model {spec.model}: choose --mixing none.")

    def objective(network: Network, batch: Batch, step: int) -> Tensor:
        with mixing(network, stages, mix, names=(spec.seed, step), sizes=batch.sizes) if mix else nullcontext():
            return loss(network, batch)

    return objective


def erm(network: Network, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the batch: all source domains' images, concatenated."""
    return F.cross_entropy(network(batch.inputs).float(), batch.targets)  # of bf16 logits too


def coral(network: Network, batch: Batch, *, weight: float = 1.0) -> Tensor:
    """Return the cross-entropy plus `weight` times CORAL's penalty (Sun and Saenko 2016, as in khanrc/swad).

    Args:
        network: its features are aligned.
        batch: of the source domains, each at least two images.
        weight: of the penalty.
    """
    features = network.features(batch.inputs)
    loss = F.cross_entropy(network.head(features).float(), batch.targets)
    return loss + weight * alignment(features.float().split(batch.sizes))


def alignment(domains: Sequence[Tensor]) -> Tensor:
    """Return the mean over pairs of domains of the mean squared difference of means and of covariances.

    Args:
        domains: features (n_d, width) of each domain; one domain alone has nothing to be aligned with.
    """
    moments = [(each.mean(0), torch.cov(each.T)) for each in domains]
    pairs = [F.mse_loss(m, n) + F.mse_loss(c, d) for (m, c), (n, d) in combinations(moments, 2)]
    return torch.stack(pairs).mean() if pairs else domains[0].new_zeros(())
