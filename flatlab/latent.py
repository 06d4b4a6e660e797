"""The weights that a quantizer sees: latent ones in full precision, and what they are rounded to."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from flatlab.checkpoints import network
from flatlab.models import Network
from flatlab.quant.attach import attach, bake, quantized_layers
from flatlab.quant.lsq import LSQ
from flatlab.runs import Run
from flatlab.specs import Place, RunSpec


@dataclass(frozen=True)
class Layer:
    """One quantized weight.

    Attributes:
        weight: the latent weight, in full precision.
        quantized: what the network computes with.
        step: its step sizes, which broadcast against it.
        bits: of the codes.
    """

    weight: Tensor
    quantized: Tensor
    step: Tensor
    bits: int


def trained_layers(run: Run, checkpoint: str, place: Place) -> dict[str, Layer]:
    """Return each weight that a run has quantized, by its layer's name; none where it has no quantizer.

    Args:
        run: finished.
        checkpoint: "selected" or "last".
        place: device and data.
    """
    return _layers(network(run, checkpoint, place), run.spec)


def _layers(loaded: Network, spec: RunSpec) -> dict[str, Layer]:
    bits = spec.quantizer.bits if spec.quantizer else 0
    return {
        name: _layer(layer.get_parameter("parametrizations.weight.original"), layer.weight, quantizer.scale, bits)
        for name, (layer, quantizer) in quantized_layers(loaded).items()
    }


def _layer(weight: Tensor, quantized: Tensor, step: Tensor, bits: int) -> Layer:
    return Layer(weight.detach().clone(), quantized.detach().clone(), step.detach().clone(), bits)


def rounded(weight: Tensor, bits: int, *, granularity: str, name: str) -> Layer:
    """Return a weight rounded to the nearest of the levels that LSQ would begin with.

    Args:
        weight: of a layer.
        bits: 2 to 16.
        granularity: "channel" or "tensor".
        name: what an error calls it.
    """
    quantizer = LSQ(weight, bits=bits, granularity=granularity, name=name).to(weight.device)
    return _layer(weight, quantizer(weight), quantizer.scale, bits)


def latent_network(run: Run, checkpoint: str, place: Place) -> tuple[Network, dict[str, Layer]]:
    """Return a run's network with its latent weights, as a plain one, and what its quantizer makes of them.

    Of a run without a quantizer that is its network, and no layer.

    Args:
        run: finished.
        checkpoint: "selected" or "last".
        place: device and data.
    """
    loaded = network(run, checkpoint, place)
    layers = _layers(loaded, run.spec)
    bake(loaded)
    with torch.no_grad():
        for name, layer in layers.items():
            loaded.get_parameter(f"{name}.weight").copy_(layer.weight)
    return loaded, layers


def quantizable(loaded: Network) -> list[str]:
    """Return the names of the layers that a quantizer would be attached to; refuses a network that has none."""
    return attach(deepcopy(loaded))
