"""The weights that a quantizer sees: latent ones in full precision, and what they are rounded to."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatlab.checkpoints import network
from flatlab.quant.attach import bake, layers, quantized_layers, tensor_of
from flatlab.quant.codebook import check_finite
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
    """Return each weight that a run has quantized, by its name; none where it has no quantizer.

    Args:
        run: finished.
        checkpoint: "selected" or "last".
        place: device and data.
    """
    return _layers(network(run, checkpoint, place), run.spec)


def _layers(loaded: nn.Module, spec: RunSpec) -> dict[str, Layer]:
    bits = spec.quantizer.bits if spec.quantizer else 0
    return {
        f"{name}.{tensor_of(each.layer)}": _layer(each.latent, each.weight, each.quantizer.scale, bits)
        for name, each in quantized_layers(loaded).items()
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
    check_finite(weight, name)
    quantizer = LSQ(weight, bits=bits, granularity=granularity).to(weight.device)
    return _layer(weight, quantizer(weight), quantizer.scale, bits)


def latent_network(run: Run, checkpoint: str, place: Place) -> tuple[nn.Module, dict[str, Layer]]:
    """Return a run's network with its latent weights, as a plain one, and what its quantizer makes of them, by name.

    Of a run without a quantizer that is its network, and no layer.

    Args:
        run: finished.
        checkpoint: "selected" or "last".
        place: device and data.
    """
    loaded = network(run, checkpoint, place)
    found = _layers(loaded, run.spec)
    bake(loaded)
    with torch.no_grad():
        for name, layer in found.items():
            loaded.get_parameter(name).copy_(layer.weight)
    return loaded, found


def quantizable(loaded: nn.Module) -> list[str]:
    """Return the names of the weights that a quantizer would be attached to; refuses a network that has none."""
    return [f"{name}.{tensor_of(layer)}" for name, layer in layers(loaded).items()]
