"""Actions before each update from the switch on: INQ's stages and weight noise."""

from typing import Self

import torch
from torch import Tensor, nn

from flatlab.quant.attach import layers, quantized_layers, tensor_of
from flatlab.quant.codebook import initial_scale, levels
from flatlab.quant.inq import INQ
from flatlab.seeds import generator
from flatlab.specs.quantizers import INQSpec
from flatlab.specs.run import RunSpec


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


class WeightNoise:
    """Draws U(-a, a) for each weight at each step: kept, or around the gradient alone.

    Called before each update, it draws. As a context around a gradient it adds what was drawn, and takes it off again
    to the bit; where the noise is kept, the context does nothing.

    Args:
        network: the layers that a quantizer would take are disturbed.
        spec: of the run; `spec.noise` says how large, its seed and the step which draw.

    Attributes:
        amplitudes: a by the layer's name, shape () or (C, 1, ...).
    """

    def __init__(self, network: nn.Module, spec: RunSpec) -> None:
        assert spec.noise is not None
        self.spec, self.noise = spec, spec.noise
        self.weights: dict[str, nn.Parameter] = {
            n: getattr(each, tensor_of(each)) for n, each in layers(network).items()
        }
        self.amplitudes = {name: self._amplitude(weight) for name, weight in self.weights.items()}
        self.drawn: dict[str, Tensor] = {}
        self.home: dict[str, Tensor] = {}

    @torch.no_grad()
    def _amplitude(self, weight: Tensor) -> Tensor:
        """Return a: U(-a, a) has the variance a^2 / 3, and independent draws add up in variance."""
        if self.noise.amplitude is not None or self.noise.bits is None:
            return torch.tensor(self.noise.amplitude)
        low, high = levels(self.noise.bits)
        scale = initial_scale(weight, high, granularity=self.noise.granularity)
        error = (weight / scale).clamp(low, high).round() * scale - weight
        axes = tuple(range(1 if scale.dim() else 0, weight.dim()))
        draws = self.spec.steps + 1 - (self.spec.switch or 0) if self.noise.persistent else 1
        return (3 * error.square().mean(axes, keepdim=scale.dim() > 0) / draws).sqrt().cpu()

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Draw the noise of a step; add it where it is kept."""
        device = next(iter(self.weights.values())).device
        draws = generator("weight noise", self.spec.seed, step, device=device.type)
        for name, weight in self.weights.items():
            uniform = torch.rand(weight.shape, generator=draws, device=device, dtype=weight.dtype)
            self.drawn[name] = (2 * uniform - 1) * self.amplitudes[name].to(device)
            if self.noise.persistent:
                weight.add_(self.drawn[name])

    @torch.no_grad()
    def __enter__(self) -> Self:
        """Add the noise of the step."""
        if not self.noise.persistent:
            for name, weight in self.weights.items():
                self.home[name] = weight.clone()
                weight.add_(self.drawn[name])
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        """Take it off again: copied, not subtracted, which is exact."""
        for name, start in self.home.items():
            self.weights[name].copy_(start)
        self.home.clear()
