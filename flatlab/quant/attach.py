"""Which layers are quantized, and how a quantized network becomes a plain one again.

QT-DoG (arXiv 2410.06020, App. B) quantizes the weights of every layer but the last: each convolution, not the head.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from flatlab.errors import UserError
from flatlab.quant.codebook import SMALLEST_SCALE
from flatlab.quant.lsq import LSQ


def attach(network: nn.Module, *, bits: int = 7, granularity: str = "channel", grad_scale: str = "shared") -> list[str]:
    """Quantize the weight of each convolution in place; return the layers' names.

    The latent weights stay the very parameters that they were, so an optimizer keeps their moments; the new step
    sizes (`scales`) have to be given to it. The options are LSQ's. The network is left alone when this raises.

    Raises:
        UserError: nothing to quantize, a weight that is parametrized already, or what LSQ refuses.
    """
    layers = dict(_convolutions(network))
    if not layers:
        raise UserError("Nothing to quantize: the network holds no Conv2d outside its head")
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer):
            raise UserError(f"{name} is parametrized already; call bake() on the network before attach()")
    quantizers = {
        name: LSQ(layer.weight, bits=bits, granularity=granularity, grad_scale=grad_scale, name=f"{name}.weight")
        for name, layer in layers.items()
    }
    for name, quantizer in quantizers.items():
        parametrize.register_parametrization(layers[name], "weight", quantizer)
        layers[name].train(layers[name].training)  # what was registered follows the layer's mode
    return list(layers)


def quantized_layers(network: nn.Module) -> dict[str, tuple[nn.Conv2d, LSQ]]:
    """Return each quantized layer and its quantizer, by the layer's name."""
    found = {}
    for name, layer in _convolutions(network):
        if parametrize.is_parametrized(layer, "weight"):
            quantizer = layer.get_submodule("parametrizations.weight.0")
            if isinstance(quantizer, LSQ):
                found[name] = layer, quantizer
    return found


def scales(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the learned step sizes, by the name of the layer that they belong to."""
    return {name: quantizer.scale for name, (_, quantizer) in quantized_layers(network).items()}


@torch.no_grad()
def clamp_scales(network: nn.Module, *, floor: float = SMALLEST_SCALE) -> None:
    """Raise step sizes below `floor` to it, in place: an optimizer's step may carry one past zero."""
    for scale in scales(network).values():
        scale.clamp_(min=floor)


def bake(network: nn.Module) -> None:
    """Turn a quantized network into a plain one in place: quantized values become the weights, step sizes go.

    The outputs stay the same to the bit, and so do the order and the names of the parameters that the network had
    before `attach`. The baked weights are new parameters: copies of the network and optimizers of the latent weights
    are left alone.
    """
    for layer, _ in quantized_layers(network).values():
        _bake(layer)


def _bake(layer: nn.Conv2d) -> None:
    # parametrize.remove_parametrizations deletes the property `weight` from the class, which copy.deepcopy shares
    # between copies: baking a copy would break the original. It also puts the weight behind the bias, and with it
    # each direction in the space of flat vectors.
    parameters = {
        "weight": nn.Parameter(layer.weight.detach().clone()),
        "bias": cast("nn.Parameter | None", layer.bias),
    }
    del layer.parametrizations, layer.bias
    layer.__class__ = type(layer).__bases__[0]
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)


def _convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and name.split(".")[0] != "head":
            yield name, layer
