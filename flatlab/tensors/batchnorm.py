"""BatchNorm's running statistics, recomputed for changed weights (Izmailov et al. 2018, section 3.2)."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatlab.errors import UserError
from flatlab.tensors.calls import call
from flatlab.tensors.nested import Batch, Data, read


class Statistics:
    """Computes the running statistics of a model's BatchNorm layers from fixed batches, weighted by their sizes.

    Args:
        model: in eval mode; a private copy, whose weights may change between calls of `renew`.
        data: training batches; None keeps the statistics.

    Raises:
        UserError: if there is no BatchNorm with running statistics, or no sample.
    """

    def __init__(self, model: nn.Module, data: Data | None) -> None:
        self.model = model
        self.layers: list[Any] = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if data is not None and not self.layers:
            raise UserError(
                "recompute needs a model with BatchNorm layers that keep running statistics, got one without."
            )
        device = next(model.parameters()).device
        self.batches: Sequence[Batch] = [] if data is None else read("recompute", data, device)

    def renew(self) -> None:
        """Compute the statistics at the current weights."""
        if not self.batches:
            return
        try:
            recompute(self.model, self.layers, ((batch.inputs, batch.size) for batch in self.batches))
        finally:
            for layer in self.layers:
                layer.eval()


def recompute(model: nn.Module, layers: Sequence[Any], batches: Iterable[tuple[Any, int]]) -> None:
    """Set the running statistics of BatchNorm layers to their mean over batches; leaves the layers in training mode.

    Args:
        model: the model.
        layers: its BatchNorm layers.
        batches: inputs, and their number of images.
    """
    seen, momenta = 0, [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    try:
        for inputs, size in batches:
            seen += size
            for layer in layers:
                layer.momentum = size / seen  # the mean over images, for batches of any sizes
            call(model, inputs)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
