"""The training batches of a run, and BatchNorm's statistics for averaged weights."""

import torch
from torch import nn

from flatlab.data.batches import TrainingStream
from flatlab.loading.data import Domains
from flatlab.models.networks import batchnorms
from flatlab.seeds import seeded
from flatlab.specs.run import RunSpec
from flatlab.tensors.batchnorm import recompute


def stream(spec: RunSpec, domains: Domains, device: torch.device) -> TrainingStream:
    """Return the batches that a run is trained on."""
    rows = {name: domains.in_[name] for name in domains.sources}
    augmented = spec.augment == "domainbed"
    return TrainingStream(
        domains.data, rows, batch_size=spec.batch_size, seed=spec.seed, device=device, augmented=augmented
    )


@torch.no_grad()
def refresh(network: nn.Module, spec: RunSpec, domains: Domains, device: torch.device) -> None:
    """Recompute BatchNorm's running statistics in place for averaged weights (khanrc/swad), unless they are frozen.

    Args:
        network: the network with the averaged weights.
        spec: the run; the statistics are those of `average.refresh_batches` batches after its last training batch.
        domains: its data.
        device: device of the network.
    """
    layers = [] if spec.freeze_batchnorm else batchnorms(network)
    if not layers:
        return
    batches = stream(spec, domains, device)
    network.train()
    unseen = range(spec.steps + 1, spec.steps + 1 + spec.average.refresh_batches)
    inputs = (batches.batch(step).inputs for step in unseen)
    with seeded("dropout", spec.seed, "statistics", device=device):
        recompute(network, layers, ((images, len(images)) for images in inputs))
