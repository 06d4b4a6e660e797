"""INQ's schedule: at each stage a larger share of the weights is quantized and frozen, the largest first."""

import torch
from torch import nn

from flatlab.quant.attach import quantized_layers
from flatlab.quant.inq import INQ
from flatlab.quantspecs import INQSpec


class Stages:
    """Called before each update; acts on those where a stage begins (Zhou et al. 2017, algorithm 1).

    Args:
        network: its layers quantized by INQ.
        optimizer: Adam; the moments of frozen weights are cleared, so that momentum does not move them on.
        spec: shares, and the steps between them.
        start: step of the first stage.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, spec: INQSpec, *, start: int) -> None:
        self.network, self.optimizer, self.spec, self.start = network, optimizer, spec, start

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Begin the stage of this step, where there is one."""
        stage, within = divmod(step - self.start, self.spec.every)
        if within or stage >= len(self.spec.fractions):
            return
        for quantized in quantized_layers(self.network).values():
            if isinstance(quantized.quantizer, INQ):
                quantized.quantizer.advance(quantized.latent, self.spec.fractions[stage])
                for name, moment in self.optimizer.state.get(quantized.latent, {}).items():
                    if name != "step":
                        moment.masked_fill_(quantized.quantizer.frozen, 0.0)
