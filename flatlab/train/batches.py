"""The training batches of a run, and BatchNorm's statistics for averaged weights, from batches no step has seen."""

import torch
from torch import nn

from flatlab.data.batches import TrainingStream
from flatlab.loading.data import Domains
from flatlab.models.networks import batchnorms
from flatlab.specs.run import RunSpec
from flatlab.tensors.batchnorm import recompute


def stream(spec: RunSpec, domains: Domains, device: torch.device) -> TrainingStream:
    """Return the batches that a run is trained on."""
    rows = {name: domains.inside[name] for name in domains.sources}
    augmented = spec.augment == "domainbed"
    return TrainingStream(
        domains.data, rows, batch_size=spec.batch_size, seed=spec.seed, device=device, augmented=augmented
    )


@torch.no_grad()
def refresh(network: nn.Module, spec: RunSpec, domains: Domains, device: torch.device) -> None:
    """Compute BatchNorm's running statistics for averaged weights, from unseen batches (khanrc/swad); unless frozen.

    Args:
        network: holds the averaged weights.
        spec: of the run that provides them; the batches after its last step are taken.
        domains: its data.
        device: where the network is.
    """
    layers = [] if spec.freeze_batchnorm else batchnorms(network)
    if not layers:
        return
    batches = stream(spec, domains, device)
    network.train()
    unseen = range(spec.steps + 1, spec.steps + 1 + spec.average.refresh_batches)
    inputs = (batches.batch(step).inputs for step in unseen)
    recompute(network, layers, ((images, len(images)) for images in inputs))
