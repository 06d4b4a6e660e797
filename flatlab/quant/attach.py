"""Attaching quantizers to layers, and baking a quantized network into a plain one.

QT-DoG (arXiv 2410.06020, App. B) quantizes the weights of every layer but the last: each convolution and, in a vision
transformer, each linear map (qkv, projections, MLP, patch embedding), not the head.
"""

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from flatlab.errors import UserError
from flatlab.quant.codebook import SMALLEST_SCALE, check_finite
from flatlab.quant.fixed import Fixed
from flatlab.quant.inq import INQ
from flatlab.quant.lsq import LSQ, Activations

Quantizer = LSQ | INQ | Fixed
Make = Callable[[str, Tensor, int], Quantizer]  # from a layer's name, its weight and the axis of its output channels
KINDS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
LOG = logging.getLogger("flatlab")


def tensor_of(layer: nn.Module) -> str:
    """Return the name of the tensor that is quantized: attention keeps the weights of q, k and v in one."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the weight's output channels.

    A transposed convolution and GPT-2's `Conv1D` have them second. In a grouped transposed convolution, channels at
    the same position of their groups share an index on axis 1; in a depthwise one, each has its own on axis 0.
    """
    if not isinstance(layer, _ConvTransposeNd):
        return int(not isinstance(layer, KINDS) and isinstance(layer, _kinds()))
    return int(layer.groups == 1 or layer.out_channels > layer.groups)


def _kinds() -> tuple[type[nn.Module], ...]:
    """Return the kinds of layers that are quantized; GPT-2's transposed linear map once transformers is loaded."""
    theirs = sys.modules.get("transformers.pytorch_utils")
    return (*KINDS, theirs.Conv1D) if theirs else KINDS


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
        """The latent weight, which is trained."""
        return cast("nn.Parameter", self.layer.get_submodule(f"parametrizations.{tensor_of(self.layer)}").original)


def layers(network: nn.Module, *, outside: str = "head", embeddings: bool = False) -> dict[str, nn.Module]:
    """Return the layers that can be quantized, by name: convolutions, linear maps and attention, except the head.

    A weight that several layers share is returned once, by the first layer's name; one shared with the head is not.

    Args:
        network: any module.
        outside: first component of the names of layers that are excluded: the head.
        embeddings: whether embeddings are included, with rows as output channels.

    Raises:
        UserError: there is no such layer.
    """
    named = network.named_parameters(remove_duplicate=False)
    known = {id(each) for name, each in named if name.split(".")[0] == outside}
    found = {}
    for name, layer in _places(network, outside, embeddings=embeddings):
        if id(weight := _stored(layer)) not in known:
            known.add(id(weight))
            found[name] = layer
    if not found:
        raise UserError(
            f"Nothing to quantize: the network holds no convolution or linear map outside of its {outside!r}."
        )
    return found


def _places(network: nn.Module, outside: str | None, *, embeddings: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield each layer that can be quantized except the head, tied ones repeatedly; embeddings are last."""
    for kinds in (_kinds(), (nn.Embedding,)) if embeddings else (_kinds(),):
        for name, layer in network.named_modules():
            if isinstance(layer, kinds) and name.split(".")[0] != outside and _stored(layer) is not None:
                yield name, layer


def _stored(layer: nn.Module) -> nn.Parameter | None:
    """Return the parameter of a layer: of a parametrized one, the original."""
    name = tensor_of(layer)
    if parametrize.is_parametrized(layer, name):
        return next(layer.get_submodule(f"parametrizations.{name}").parameters(recurse=False))
    return cast("nn.Parameter | None", getattr(layer, name))


def attach_each(
    network: nn.Module,
    make: Make,
    *,
    outside: str = "head",
    skip: Collection[str] = (),
    embeddings: bool = False,
) -> list[str]:
    """Quantize the weight of each layer in place with the quantizer `make(name, weight, axis)`; return the names.

    The latent weights are the same parameter objects as before, so an optimizer keeps their moments. A weight that
    several modules share gets one quantizer, and is named by the first layer. A warning names other matrices outside of
    the head, which stay in floating point. If an error is raised, the network is unchanged.

    Args:
        network: any module.
        make: returns the quantizer of a layer.
        outside: first component of the names of layers that are excluded: the head.
        skip: names of other layers that are excluded, without a warning.
        embeddings: whether embeddings are quantized, with rows as output channels.

    Returns:
        The names of the quantized layers.

    Raises:
        UserError: there is nothing to quantize, a weight is parametrized already or not finite, or `make` raises it.
    """
    made: dict[str, tuple[Quantizer, list[tuple[nn.Module, str]]]] = {}
    left = {id(each): name for name, each in network.named_parameters() if not is_lazy(each) and each.dim() > 1}
    for name, layer in layers(network, outside=outside, embeddings=embeddings).items():
        weight = cast("nn.Parameter", _stored(layer))
        left.pop(id(weight), None)
        if name in skip:
            continue
        holders = _holders(network, weight)
        _check_free(name, layer, holders)
        check_finite(weight, f"{name}.{tensor_of(layer)}")
        made[name] = make(name, weight, channel_axis(layer)), holders
    for quantizer, holders in made.values():
        for holder, tensor in holders:
            parametrize.register_parametrization(holder, tensor, quantizer)
            holder.train(holder.training)  # puts the quantizer into the layer's mode
    if named := [name for name in left.values() if name.split(".")[0] != outside]:
        LOG.warning("Quantization leaves %s in floating point.", ", ".join(named))
    return list(made)


def _check_free(name: str, layer: nn.Module, holders: list[tuple[nn.Module, str]]) -> None:
    """Refuse a layer whose weight is not initialised yet, or is not a plain parameter."""
    if is_lazy(getattr(layer, tensor_of(layer))):
        raise UserError(f"{name} has no weight before its first input; pass a batch through the network first.")
    if any(_quantized_tensors(module) for module in (layer, *(holder for holder, _ in holders))):
        raise UserError(f"{name} is parametrized already; call bake() on the network before attach()")
    derived = any(isinstance(holder, parametrize.ParametrizationList) for holder, _ in holders)
    if derived or not holders or any(parametrize.is_parametrized(holder) for holder, _ in holders):
        raise UserError(
            f"{name}.{tensor_of(layer)} is computed from other parameters, as under weight_norm; make it a plain one "
            f"before attach(), for instance by torch.nn.utils.parametrize.remove_parametrizations."
        )


def _holders(network: nn.Module, weight: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold a weight, each with the weight's name in it; several if layers are tied."""
    return [(module, name) for module in network.modules() for name, own in module._parameters.items() if own is weight]


def attach(
    network: nn.Module,
    *,
    outside: str = "head",
    skip: Collection[str] = (),
    embeddings: bool = False,
    **options: Any,
) -> list[str]:
    """Quantize the weight of each convolution and linear map in place by LSQ; return the layers' names.

    Convolutions of any dimension, transposed ones, linear and bilinear maps, and the joint projection of attention are
    quantized; embeddings only on request, row by row. Other matrices, such as those of recurrent layers, stay in
    floating point, and a warning names them. A weight that several modules share is quantized once, and named by the
    first layer.

    The latent weights are the same parameter objects as before, so an optimizer keeps their moments. The new step sizes
    (`scales`) must be added to the optimizer, and kept positive by `clamp_scales` after each of its steps. If an error
    is raised, the network is unchanged.

    Args:
        network: any module.
        outside: first component of the names of layers that are excluded: the head.
        skip: names of other layers that are excluded.
        embeddings: whether embeddings are quantized, with rows as output channels.
        options: options of `LSQ`, such as `bits`.

    Returns:
        The names of the quantized layers.

    Raises:
        UserError: there is nothing to quantize, a weight is parametrized already, or an option of LSQ is not valid.
    """
    where: dict[str, Any] = {"outside": outside, "skip": skip, "embeddings": embeddings}
    return attach_each(network, lambda _, weight, axis: LSQ(weight, axis=axis, **options), **where)


def attach_activations(
    network: nn.Module, *, signed_first: bool = False, outside: str = "head", **options: Any
) -> list[str]:
    """Quantize the inputs of convolutions and linear maps in place by LSQ; return the layers' names.

    Inputs inside of `nn.MultiheadAttention` are not quantized, since torch's fused kernels do not expose them; nor are
    those of bilinear maps.

    Args:
        network: any module.
        signed_first: whether the codes of the first layer's input, the images, are signed regardless of `options`.
        outside: first component of the names of layers that are excluded: the head.
        options: options of `Activations`.

    Returns:
        The names of the layers whose inputs are quantized.
    """
    layers(network, outside=outside)  # raises if there are none
    inside = tuple(
        f"{name}." for name, layer in network.named_modules() if isinstance(layer, nn.MultiheadAttention) and name
    )
    chosen = {
        name: layer
        for name, layer in _places(network, outside)
        if not isinstance(layer, nn.MultiheadAttention | nn.Bilinear) and not name.startswith(inside or ("\0",))
    }
    for index, layer in enumerate(chosen.values()):
        own = {"signed": True} if signed_first and not index else {}
        layer.register_module("activations", Activations(**{**options, **own}))
        layer.activations.to(getattr(layer, tensor_of(layer)).device)
        layer.train(layer.training)
        layer.register_forward_pre_hook(_quantize_input)
    return list(chosen)


def _quantize_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (cast("Activations", layer.activations)(inputs[0]), *inputs[1:])


def quantized_layers(network: nn.Module) -> dict[str, Quantized]:
    """Return the quantized layers with their quantizers, by the layer's name; tied layers once, by the first name."""
    found: dict[str, Quantized] = {}
    for name, layer in _places(network, None, embeddings=True):
        if parametrize.is_parametrized(layer, tensor_of(layer)):
            quantizer = layer.get_submodule(f"parametrizations.{tensor_of(layer)}.0")
            known = any(quantizer is each.quantizer for each in found.values())
            if isinstance(quantizer, Quantizer) and not known:
                found[name] = Quantized(layer, quantizer)
    return found


def scales(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the learned step sizes (or their logarithms), by `NAME` for weights and `NAME.activations` for inputs."""
    found = {name: q.learned for name, (_, q) in quantized_layers(network).items() if isinstance(q, LSQ)}
    inputs = {name: module.scale for name, module in network.named_modules() if isinstance(module, Activations)}
    return found | inputs


@torch.no_grad()
def clamp_scales(network: nn.Module, *, floor: float = SMALLEST_SCALE) -> None:
    """Clamp step sizes to at least `floor`, in place: an optimizer's step may make one negative, unless `log_scale`."""
    for module in network.modules():
        if isinstance(module, LSQ | Activations) and isinstance(module.scale, nn.Parameter):
            module.scale.clamp_(min=floor)


def bake(network: nn.Module) -> None:
    """Replace quantized weights by plain parameters with the quantized values, in place, and remove their quantizers.

    The outputs are the same to the bit. Names, order and tying of the parameters are those before `attach`. The baked
    weights are new parameters, so copies of the network and optimizers of the latent weights are not changed. Quantized
    activations stay quantized, with frozen step sizes. A warning names layers with step sizes that are not positive.
    """
    _look_at_scales(network)
    baked: dict[nn.Module, nn.Parameter] = {}
    for module in network.modules():
        for tensor, quantizer in _quantized_tensors(module):
            if quantizer not in baked:
                weight = getattr(module, tensor).detach() + 0.0  # a copy; -0 becomes 0, as integer codes have it
                baked[quantizer] = nn.Parameter(weight)
            _bake(module, tensor, baked[quantizer])
        if isinstance(module, Activations):
            module.scale.requires_grad_(False)


def _look_at_scales(network: nn.Module) -> None:
    for name, (_, quantizer) in quantized_layers(network).items():
        count = int((quantizer.scale <= 0).sum())
        if count:
            LOG.warning(
                "%d of %d step sizes of %s are not positive: call clamp_scales() after each optimizer step, or attach "
                "with log_scale=True.",
                count,
                quantizer.scale.numel(),
                name,
            )


def _quantized_tensors(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the quantized tensors of a module, by name, each with its quantizer."""
    if not parametrize.is_parametrized(module):
        return []
    steps = {name: next(each.children()) for name, each in module.get_submodule("parametrizations").named_children()}
    return [(name, step) for name, step in steps.items() if isinstance(step, Quantizer)]


def _bake(module: nn.Module, tensor: str, weight: nn.Parameter) -> None:
    # parametrize.remove_parametrizations deletes the property `weight` from the class, which copy.deepcopy shares
    # between copies: baking a copy would break the original. It also moves the weight behind the bias, which would
    # change the order of flat vectors.
    others = dict(module._parameters)
    del module.parametrizations
    module.__class__ = type(module).__bases__[0]
    module._parameters.clear()
    module.register_parameter(tensor, weight)
    for name, parameter in others.items():
        module.register_parameter(name, parameter)
