"""Conversion of networks quantized by torch.ao (before `convert`), torchao or brevitas into plain ones.

No library is imported: a module is recognised by the names of its classes, and converted by its own public methods.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatlab.errors import UserError

LIBRARIES = ("torch.ao.", "torchao.", "brevitas.")
CLOSE = 1e-4  # tolerance relative to the largest output: float32 sums in two orders
NOT_PLAIN = ("activation_post_process", "activation_fake_quantizer", "input_quant", "output_quant")


class Rectified(nn.Module):
    """A layer and the ReLU that was fused with it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ReLU of the layer's outputs."""
        return cast("Tensor", self.layer(inputs)).relu()


def plain_network(model: nn.Module, inputs: Any = None, *, activations: bool = True) -> nn.Module:
    """Return a copy of a quantized model whose weights are plain parameters with the quantized values, in eval mode.

    Supported are models that torch.ao or torchao prepared for quantization-aware training (BatchNorm that torch.ao
    fused with a convolution is folded into its weight and bias), linear layers that torchao converted to integers, and
    layers of brevitas. Quantizers of activations are kept, with observers disabled: flatness, noise and class
    activation maps of such a network can be measured, its curvature cannot.

    Args:
        model: the quantized model; it is not changed.
        inputs: inputs of the model, several as a tuple; if given, the outputs of both networks are compared.
        activations: whether quantizers of activations are kept. Removing them changes the function; outputs are
            compared before they are removed.

    Raises:
        UserError: a module is not supported, or the outputs differ.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao says that it is deprecated wherever it is called
        source = _still(copy.deepcopy(model).eval())
        kernels = [name for name, layer in source.named_modules() if _rounds_inside(layer)]
        if kernels and activations:
            raise UserError(
                f"{kernels[0]!r} rounds its inputs inside of its integer kernel; leave that out with activations=False,"
                " or convert the weights alone, as by torchao's Int8WeightOnlyConfig."
            )
        plain = _replaced(copy.deepcopy(source), {}, {})
        _refuse_unknown(plain)
        if inputs is not None and not kernels:
            _compare(source, plain, inputs)
        if not activations:
            plain = _without_activations(plain)
    for module in plain.modules():
        if _of_library(module):
            module.straight_through = True  # type: ignore[assignment]  # read where curvature is asked for
    return plain.eval()


def _kinds(module: object) -> list[str]:
    """Return the qualified names of a module's classes in the order of method resolution."""
    return [f"{kind.__module__}.{kind.__name__}" for kind in type(module).__mro__]


def _is(module: object, library: str, *names: str) -> bool:
    return any(kind.startswith(library) and kind.rpartition(".")[2] in names for kind in _kinds(module))


def _of_library(module: object) -> bool:
    return type(module).__module__.startswith(LIBRARIES)


def _still(model: nn.Module) -> nn.Module:
    """Disable torch.ao's observers, and let brevitas return plain tensors, in place."""
    for name, module in model.named_modules():
        if _is(module, "torch.ao.", "FakeQuantizeBase"):
            cast("Any", module).disable_observer()
            if not all(bool(torch.isfinite(each).all()) for each in module.buffers()):
                raise UserError(f"{name!r} has observed no data: pass a batch through the model before plain_network.")
        if _is(module, "brevitas.", "QuantLayerMixin"):
            module.return_quant_tensor = False
    return model


def _integers(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the parameters of a layer that torchao has converted, by name."""
    yield from ((name, each) for name, each in layer._parameters.items() if type(each).__module__.startswith("torchao"))


def _rounds_inside(layer: nn.Module) -> bool:
    words = ("act_quant_kwargs", "activation_quantization", "input_quant_func")
    return any(getattr(each, word, None) is not None for _, each in _integers(layer) for word in words)


def _replaced(module: nn.Module, known: dict[Tensor, nn.Parameter], done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a module with plain layers in place of a library's; weights that several layers share stay shared."""
    for name, child in list(module._modules.items()):  # one child may occur twice
        if child is not None:
            done[child] = done[child] if child in done else _replaced(child, known, done)
            module._modules[name] = done[child]
    for name, parameter in list(_integers(module)):
        _put(module, name, parameter, parameter.dequantize(), known, varies=True)  # integers require no gradient
    for library, kinds, convert in CONVERSIONS:
        if _is(module, library, *kinds):
            return convert(module, known)
    return module


def _put(
    module: nn.Module,
    name: str,
    source: Tensor,
    value: Tensor,
    known: dict[Tensor, nn.Parameter],
    *,
    varies: bool | None = None,
) -> None:
    """Register a parameter with the quantized values; layers that share a weight and its values share the parameter."""
    before = known.get(source)
    if before is None or not torch.equal(before, value):
        gradient = source.requires_grad if varies is None else varies
        known[source] = nn.Parameter(value.detach().clone(), requires_grad=gradient)
    module.register_parameter(name, known[source])


def _base(layer: nn.Module, weight: Tensor, known: dict[Tensor, nn.Parameter]) -> nn.Module:
    """Return the torch.nn layer that a library's layer derives from, with this weight and its activation quantizers."""
    kind: Any = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn.modules."))
    plain: nn.Module = kind.__new__(kind)
    nn.Module.__init__(plain)
    own = {*kind.__constants__, "transposed", "_reversed_padding_repeated_twice", "max_norm"}
    plain.__dict__.update({name: value for name, value in vars(layer).items() if name in own})
    _put(plain, "weight", cast("Tensor", layer.weight), weight, known)
    if "bias" in layer._parameters:
        plain.register_parameter("bias", cast("nn.Parameter | None", layer.bias))
    plain._forward_hooks, plain._forward_pre_hooks = layer._forward_hooks, layer._forward_pre_hooks
    for name in NOT_PLAIN:
        if isinstance(child := getattr(layer, name, None), nn.Module):
            plain.register_module(name, child)
    return plain


def _of_ao(layer: nn.Module, known: dict[Tensor, nn.Parameter]) -> nn.Module:
    own = cast("Any", layer)
    bn, weight = own._modules.get("bn"), own.weight
    if bn is None:
        plain = _base(layer, own.weight_fake_quant(weight), known)
    else:
        factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        plain = _base(layer, own.weight_fake_quant(weight * factor.reshape(-1, *[1] * (weight.dim() - 1))), known)
        bias = 0.0 if own.bias is None else own.bias
        plain.register_parameter("bias", nn.Parameter(bn.bias + (bias - bn.running_mean) * factor))
    if "ReLU" not in type(layer).__name__:
        return plain
    fused, hooks = Rectified(plain), plain._forward_hooks  # these act on the outputs of the ReLU
    plain._forward_hooks, fused._forward_hooks = fused._forward_hooks, hooks
    if observer := plain._modules.pop("activation_post_process", None):
        fused.register_module("activation_post_process", observer)
    return fused


def _of_torchao(layer: nn.Module, known: dict[Tensor, nn.Parameter]) -> nn.Module:
    own = cast("Any", layer)
    weight = own.weight if own.weight_fake_quantizer is None else own.weight_fake_quantizer(own.weight)
    plain = _base(layer, weight, known)
    if "activation_fake_quantizer" in plain._modules:
        plain.register_forward_pre_hook(_first)
    return plain


def _of_brevitas(layer: nn.Module, known: dict[Tensor, nn.Parameter]) -> nn.Module:
    own = cast("Any", layer)
    if own.bias is not None and own.bias_quant.is_quant_enabled:
        raise UserError(
            f"A {type(layer).__name__} of brevitas quantizes its bias by the step size of its inputs, which no plain"
            " layer does; leave its bias in floating point with bias_quant=None."
        )
    plain = _base(layer, _values(own.quant_weight()), known)
    for name, register in (
        ("input_quant", partial(plain.register_forward_pre_hook, _first)),
        ("output_quant", partial(plain.register_forward_hook, _last)),
    ):
        if getattr(own, name).is_quant_enabled:
            register()
        else:
            del plain._modules[name]
    return plain


def _values(found: Any) -> Tensor:
    """Return the values of what brevitas' quantizers return: a tensor, or a tensor with its step size."""
    return cast("Tensor", getattr(found, "value", found))


def _first(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    name = next(name for name in ("activation_fake_quantizer", "input_quant") if name in layer._modules)
    return (_values(layer.get_submodule(name)(inputs[0])), *inputs[1:])


def _last(layer: nn.Module, inputs: tuple[Any, ...], outputs: Tensor) -> Tensor:
    del inputs
    return _values(layer.get_submodule("output_quant")(outputs))


Convert = Callable[[nn.Module, dict[Tensor, nn.Parameter]], nn.Module]
CONVERSIONS: tuple[tuple[str, tuple[str, ...], Convert], ...] = (
    ("torch.ao.nn.qat.", ("Linear", "_ConvNd", "Embedding", "EmbeddingBag"), _of_ao),
    ("torch.ao.nn.intrinsic.qat.", ("_ConvBnNd", "LinearBn1d", "ConvReLU1d", "ConvReLU2d", "LinearReLU"), _of_ao),
    ("torchao.", ("FakeQuantizedLinear", "FakeQuantizedEmbedding"), _of_torchao),
    ("brevitas.", ("QuantWeightBiasInputOutputLayer",), _of_brevitas),
)
ACTIVATIONS = (
    ("torch.ao.", "FakeQuantizeBase"),
    ("torchao.", "FakeQuantizerBase"),
    ("brevitas.", "ActQuantProxyFromInjectorBase"),
)


def _without_activations(module: nn.Module) -> nn.Module:
    """Return a module without its quantizers of activations."""
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        if any(_is(child, *each) for each in ACTIVATIONS):
            module._modules[name] = nn.Identity()
        elif _is(child, "brevitas.", "QuantNonLinearActLayer"):
            module._modules[name] = cast("Any", child).act_quant.fused_activation_quant_proxy.activation_impl
        else:
            _without_activations(child)
    return module


def _refuse_unknown(model: nn.Module) -> None:
    """Refuse parametrizations, and modules of a library that are neither converted nor activation quantizers."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        known = (*ACTIVATIONS, ("brevitas.", "QuantNonLinearActLayer"), ("torch.ao.", "QuantStub", "DeQuantStub"))
        if any(_is(module, *each) for each in known):
            inside |= set(module.modules())
        elif _of_library(module) or parametrize.is_parametrized(module):
            raise UserError(
                f"{name!r} is a {type(module).__module__}.{type(module).__name__}, which plain_network does not know;"
                " it converts fake-quantized layers of torch.ao (before convert), torchao and brevitas."
            )


def _compare(source: nn.Module, plain: nn.Module, inputs: Any) -> None:
    """Refuse outputs that differ by more than float32 rounding, with torch.ao's activation quantizers disabled.

    With these, a sum in another order changes some activations by a whole step.
    """
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    fakes: list[Any] = [
        child
        for module in chain(source.modules(), plain.modules())
        for name, child in module.named_children()
        if _is(child, "torch.ao.", "FakeQuantizeBase")
        and name != "weight_fake_quant"
        and cast("Any", child).fake_quant_enabled[0]
    ]
    for fake in fakes:
        fake.disable_fake_quant()
    expected, found = (_values(model(*given)) for model in (source, plain))
    for fake in fakes:
        fake.enable_fake_quant()
    largest, off = float(expected.abs().max()), float((expected - found).abs().max())
    if not off <= CLOSE * largest:
        raise UserError(
            f"The outputs of the converted network differ from the model's by {off:.3g} (largest output {largest:.3g}):"
            " a part of the model is converted incorrectly; report its layers."
        )
