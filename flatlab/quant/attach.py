"""Which layers are quantized, and how a quantized network becomes a plain one again.

QT-DoG (arXiv 2410.06020, App. B) quantizes the weights of every layer but the last: each convolution and, in a vision
transformer, each linear map (qkv, projections, MLP, patch embedding), not the head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatlab.errors import UserError
from flatlab.quant.codebook import SMALLEST_SCALE, check_finite
from flatlab.quant.fixed import Fixed
from flatlab.quant.inq import INQ
from flatlab.quant.lsq import LSQ, Activations

Quantizer = LSQ | INQ | Fixed
KINDS = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)


def tensor_of(layer: nn.Module) -> str:
    """Return the name of the tensor that is quantized: attention keeps the weights of q, k and v in one."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


class Quantized(NamedTuple):
    """A quantized layer, and its quantizer."""

    layer: nn.Module
    quantizer: Quantizer

    @property
    def weight(self) -> Tensor:
        """The quantized weight, detached."""
        return cast("Tensor", getattr(self.layer, tensor_of(self.layer))).detach()

    @property
    def latent(self) -> nn.Parameter:
        """The weight behind it, which is trained."""
        return cast("nn.Parameter", self.layer.get_submodule(f"parametrizations.{tensor_of(self.layer)}").original)


def layers(network: nn.Module, *, outside: str = "head") -> dict[str, nn.Module]:
    """Return the layers that can be quantized, by name: convolutions, linear maps and attention outside of the head.

    Args:
        network: any module.
        outside: the first part of the names that are left out.

    Raises:
        UserError: there are none.
    """
    found = {}
    for name, layer in network.named_modules():
        own = isinstance(layer, KINDS) and getattr(layer, tensor_of(layer)) is not None
        if own and name.split(".")[0] != outside:
            found[name] = layer
    if not found:
        raise UserError(f"Nothing to quantize: the network holds no Conv2d or Linear layer outside of its {outside!r}.")
    return found


def attach_each(network: nn.Module, make: Callable[[str, Tensor], Quantizer], *, outside: str = "head") -> list[str]:
    """Quantize the weight of each layer in place by what `make(name, weight)` returns; return the layers' names.

    The latent weights stay the very parameters that they were, so an optimizer keeps their moments. The network is
    left alone when this raises.

    Raises:
        UserError: nothing to quantize, a weight that is parametrized already or not finite, or what `make` refuses.
    """
    made = {}
    for name, layer in layers(network, outside=outside).items():
        if parametrize.is_parametrized(layer):
            raise UserError(f"{name} is parametrized already; call bake() on the network before attach()")
        weight = cast("Tensor", getattr(layer, tensor_of(layer)))
        check_finite(weight, f"{name}.{tensor_of(layer)}")
        made[name] = layer, make(name, weight)
    for layer, quantizer in made.values():
        parametrize.register_parametrization(layer, tensor_of(layer), quantizer)
        layer.train(layer.training)  # what was registered follows the layer's mode
    return list(made)


def attach(network: nn.Module, *, outside: str = "head", **options: Any) -> list[str]:
    """Quantize the weight of each convolution and linear map in place by LSQ; return the layers' names.

    The latent weights stay the very parameters that they were, so an optimizer keeps their moments; the new step
    sizes (`scales`) have to be given to it. The network is left alone when this raises.

    Args:
        network: any module.
        outside: the first part of the names that are left out: the head.
        options: LSQ's.

    Raises:
        UserError: nothing to quantize, a weight that is parametrized already, or what LSQ refuses.
    """
    return attach_each(network, lambda _, weight: LSQ(weight, **options), outside=outside)


def attach_activations(network: nn.Module, *, bits: int = 8, signed: bool = False, outside: str = "head") -> list[str]:
    """Quantize the inputs of convolutions and linear maps too, by LSQ; return the layers' names.

    Inside of attention, inputs stay as they are: torch's fused kernels do not show them.
    """
    inside = tuple(
        f"{name}." for name, layer in network.named_modules() if isinstance(layer, nn.MultiheadAttention) and name
    )
    chosen = {
        name: layer
        for name, layer in layers(network, outside=outside).items()
        if not isinstance(layer, nn.MultiheadAttention) and not name.startswith(inside or ("\0",))
    }
    for layer in chosen.values():
        layer.register_module("activations", Activations(bits=bits, signed=signed))
        layer.activations.to(getattr(layer, tensor_of(layer)).device)
        layer.train(layer.training)
        layer.register_forward_pre_hook(_quantize_input)
    return list(chosen)


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (cast("Activations", layer.activations)(inputs[0]), *inputs[1:])


def quantized_layers(network: nn.Module) -> dict[str, Quantized]:
    """Return each quantized layer and its quantizer, by the layer's name."""
    found = {}
    for name, layer in network.named_modules():
        if isinstance(layer, KINDS) and parametrize.is_parametrized(layer, tensor_of(layer)):
            quantizer = layer.get_submodule(f"parametrizations.{tensor_of(layer)}.0")
            if isinstance(quantizer, Quantizer):
                found[name] = Quantized(layer, quantizer)
    return found


def scales(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the learned step sizes (or their logarithms), by the layer's name; `.activations` marks an input's."""
    found = {name: q.learned for name, (_, q) in quantized_layers(network).items() if isinstance(q, LSQ)}
    inputs = {name: module.scale for name, module in network.named_modules() if isinstance(module, Activations)}
    return found | inputs


@torch.no_grad()
def clamp_scales(network: nn.Module, *, floor: float = SMALLEST_SCALE) -> None:
    """Raise step sizes below `floor` to it, in place: an optimizer's step may carry one past zero; no logarithm can."""
    for module in network.modules():
        if isinstance(module, LSQ | Activations) and isinstance(module.scale, nn.Parameter):
            module.scale.clamp_(min=floor)


def bake(network: nn.Module) -> None:
    """Turn a network with quantized weights into one with plain ones in place; step sizes of weights go.

    The outputs stay the same to the bit, and so do the order and the names of the parameters that the network had
    before `attach`. The baked weights are new parameters: copies of the network and optimizers of the latent weights
    are left alone. Quantized activations stay quantized, their step sizes frozen.
    """
    for quantized in quantized_layers(network).values():
        _bake(quantized)
    for module in network.modules():
        if isinstance(module, Activations):
            module.scale.requires_grad_(False)


def _bake(quantized: Quantized) -> None:
    # parametrize.remove_parametrizations deletes the property `weight` from the class, which copy.deepcopy shares
    # between copies: baking a copy would break the original. It also puts the weight behind the bias, and with it
    # each direction in the space of flat vectors.
    layer, weight = quantized.layer, quantized.weight + 0.0  # a copy; -0 becomes 0, as integer codes have it
    others = dict(layer._parameters)
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer._parameters.clear()
    layer.register_parameter(tensor_of(layer), nn.Parameter(weight))
    for name, parameter in others.items():
        layer.register_parameter(name, parameter)
