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
    """INQ's stages (Zhou et al. 2017, algorithm 1), called before each update.

    Args:
        network: the network whose layers are quantized by INQ.
        optimizer: its optimizer; the moments of frozen weights are set to 0.
        spec: shares, and the steps between the stages.
        start: step of the first stage.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, spec: INQSpec, *, start: int) -> None:
        self.network, self.optimizer, self.spec, self.start = network, optimizer, spec, start

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Freeze the next share of the weights if a stage begins at this step."""
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
    """Uniform noise U(-a, a) on each weight, drawn at each step: persistent, or only while the gradient is computed.

    Calling the object before an update draws the noise, and adds it to the weights if it is persistent. If not, using
    the object as a context around the gradient adds the noise and restores the weights exactly.

    Args:
        network: the network; the layers that a quantizer would quantize get noise.
        spec: the run; `spec.noise` determines the amplitude, its seed and the step the draws.

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
        """Return a, such that the variance a^2 / 3 times the number of draws that add up is that of rounding."""
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
        """Draw the noise of a step; add it if it is persistent."""
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
        """Restore the weights from copies, which is exact; subtraction would not be."""
        for name, start in self.home.items():
            self.weights[name].copy_(start)
        self.home.clear()
