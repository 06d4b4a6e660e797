"""Networks that torch.ao, torchao and brevitas have quantized, as plain ones; and straight-through estimators."""

import warnings

import pytest
import torch
from torch import nn

import flatlab
from flatlab.quant.libraries import _compare


def refuses(pattern, act, *given):
    with pytest.raises(flatlab.UserError, match=pattern):
        act(*given)


X = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3


@pytest.fixture(autouse=True)
def _quiet():
    """Let the libraries warn: torch.ao says that it is deprecated, the others' strings have stray backslashes."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


def net():
    first = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*first, nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3))


def ao(activations=True, graph=False):
    import torch.ao.quantization as ao

    config = ao.get_default_qat_qconfig("fbgemm")
    if not activations:
        config = ao.QConfig(activation=nn.Identity, weight=config.weight)
    model = net().train()
    if graph:
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        model = prepare_qat_fx(model, ao.QConfigMapping().set_global(config), (X,))
    else:
        model = ao.fuse_modules_qat(model, [["0", "1", "2"], ["4", "5"]])
        model.qconfig = config
        ao.prepare_qat(model, inplace=True)
    for _ in range(3):
        model(X)
    return model.eval().apply(ao.disable_observer)


def torchao(config, step):
    from torchao.quantization import PerGroup, qat, quantize_
    from torchao.quantization import quant_api as api

    grid = {"weight_dtype": torch.int4}
    made = {
        "weights": lambda: api.IntxWeightOnlyConfig(**grid, granularity=PerGroup(8)),
        "both": lambda: api.Int8DynamicActivationIntxWeightConfig(**grid, weight_granularity=PerGroup(8)),
        "int8": api.Int8WeightOnlyConfig,
    }[config]()
    model = net()
    for each in ("prepare", "convert")[: {"prepare": 1, "convert": 2, "at once": 0}[step]]:
        quantize_(model, qat.QATConfig(made, step=each))
    if step == "at once":
        quantize_(model, made)
    return model.eval()


def brevitas(activations=True, **linear):
    import brevitas.nn as bnn
    from brevitas.quant import Int8ActPerTensorFloat

    inputs = {"input_quant": Int8ActPerTensorFloat} if activations else {}
    relu = bnn.QuantReLU(return_quant_tensor=bool(linear)) if activations else nn.ReLU()
    first = bnn.QuantConv2d(1, 4, 3, padding=1, bias=False, **inputs), nn.BatchNorm2d(4), relu
    model = nn.Sequential(*first, nn.Flatten(), bnn.QuantLinear(256, 3, bias=True, weight_bit_width=4, **linear))
    model(X)
    return model.eval()


WEIGHTS_ALONE = {
    "torch.ao": lambda: ao(activations=False),
    "torchao, QAT": lambda: torchao("weights", "prepare"),
    "torchao, converted": lambda: torchao("weights", "convert"),
    "torchao, int8": lambda: torchao("int8", "at once"),
    "brevitas": lambda: brevitas(activations=False),
}
WITH_ACTIVATIONS = {
    "torch.ao": ao,
    "torch.ao, as a graph": lambda: ao(graph=True),
    "torchao, QAT": lambda: torchao("both", "prepare"),
    "brevitas": brevitas,
}


def landscape(model):
    return flatlab.Landscape(model, [(X, Y)], nn.CrossEntropyLoss())


def held_by_a_library(model):
    return [name for name, each in model.named_modules() if type(each).__module__.startswith(("torchao", "brevitas"))]


@pytest.mark.parametrize("make", WEIGHTS_ALONE.values(), ids=WEIGHTS_ALONE)
def test_a_network_with_quantized_weights_becomes_a_plain_one(make):
    model = make()
    plain = flatlab.plain_network(model, X)
    with torch.no_grad():
        torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-6)
    assert not held_by_a_library(plain) and not hasattr(plain[0], "weight_fake_quant")
    assert all(type(each) is nn.Parameter and each.requires_grad for each in plain.parameters())
    first = plain[4].layer if hasattr(plain[4], "layer") else plain[4]  # a linear map of 4 or 8 bits by groups
    assert min(len(row.unique()) for row in first.weight[:, :8]) <= 8
    spectrum = flatlab.hessian_spectrum(landscape(plain), k=1)
    dense = largest_eigenvalue(plain)
    assert spectrum.eigenvalues[0] == pytest.approx(dense, rel=1e-3)


def test_integers_that_cannot_vary_are_told():
    (remark,) = (each for each in landscape(torchao("int8", "at once")).remarks if "format" in each)
    assert "stored in a quantized format and do not vary" in remark and "plain_network" in remark


def largest_eigenvalue(model):
    """Return the largest eigenvalue by power iterations on products of autograd in double precision."""
    model = model.double()
    loss = nn.functional.cross_entropy(model(X.double()), Y)
    tensors = [each for each in model.parameters() if each.requires_grad]
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    views = [torch.randn_like(each) for each in tensors]
    for _ in range(300):
        products = torch.autograd.grad(grads, tensors, views, retain_graph=True)
        size = torch.sqrt(sum((each**2).sum() for each in products))
        views = [each / size for each in products]
    return float(size)


@pytest.mark.parametrize("make", WITH_ACTIVATIONS.values(), ids=WITH_ACTIVATIONS)
def test_quantizers_of_activations_stay_or_go(make):
    model = make()
    kept, without = flatlab.plain_network(model, X), flatlab.plain_network(model, X, activations=False)
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(kept(X), expected, rtol=1e-3, atol=1e-3)
        off = (without(X) - expected).abs().max()
    assert 1e-6 < off < 0.1 * expected.abs().max()  # roundings of 7 and 8 bits are gone, and nothing else
    assert not held_by_a_library(without)
    assert len(flatlab.sphere_flatness(landscape(kept), radii=[0.1], num_samples=8).to_frame())
    refuses(r"rounds activations: .* flatlab\.plain_network\(model, activations=False\)", curvature, kept)
    curvature(without)


def curvature(model):
    return flatlab.hessian_spectrum(landscape(model), k=1)


def test_the_model_is_left_alone():
    model = ao()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flatlab.plain_network(model, X, activations=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_weight_that_two_layers_hold_stays_one():
    model = torchao("weights", "prepare")
    model[6], model[5] = model[4], nn.Linear(8, 256)
    plain = flatlab.plain_network(model, X)
    assert plain[6].weight is plain[4].weight


def test_observers_of_a_model_that_is_still_training_stop():
    import torch.ao.quantization as ao_

    plain = flatlab.plain_network(ao().apply(ao_.enable_observer))
    with torch.no_grad():
        before = plain(X)
        plain(100 * X)
        assert torch.equal(plain(X), before)


# --- refused -------------------------------------------------------------------------------------------------------


def test_what_is_not_known_is_named():
    import torch.ao.quantization as ao_

    converted = ao_.convert(ao())
    refuses(
        r"^'0' is a torch\.ao\.nn\.intrinsic\.quantized\.\S+ConvReLU2d, which plain_network does not know",
        plain,
        converted,
    )
    parametrized = flatlab.build_network("digits-cnn", num_classes=10, in_channels=1)
    flatlab.attach(parametrized)
    refuses(r"^'features\.0' is a \S+Conv2d, which plain_network does not know", plain, parametrized)


def plain(model):
    return flatlab.plain_network(model, X)


def test_inputs_rounded_inside_of_a_kernel_are_left_out_or_refused():
    model = torchao("both", "convert")
    refuses(r"^'4' rounds its inputs inside of its integer kernel; .* activations=False", plain, model)
    without = flatlab.plain_network(model, X, activations=False)
    with torch.no_grad():
        torch.testing.assert_close(without(X), model(X), rtol=0.05, atol=0.02)


def test_a_bias_on_the_grid_of_the_inputs_is_refused():
    from brevitas.quant import Int32Bias

    model = brevitas(bias_quant=Int32Bias)
    refuses(r"^A QuantLinear of brevitas quantizes its bias .*bias_quant=None", plain, model)


def test_a_model_that_has_observed_nothing_is_refused():
    import torch.ao.quantization as ao_

    model = net().train()
    model.qconfig = ao_.get_default_qat_qconfig("fbgemm")
    ao_.prepare_qat(model, inplace=True)
    refuses(r"^'\S+' has observed no data: pass a batch", plain, model.eval())


def test_outputs_that_differ_are_refused():
    refuses(
        r"outputs of the converted network differ from the model's by \S+ \(largest output",
        _compare,
        net().eval(),
        net().eval(),
        X,
    )


class Rounded(nn.Module):
    """A linear map whose weight is rounded in its forward pass."""

    def __init__(self, how):
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(3, 64)), how

    def forward(self, inputs):
        return inputs.flatten(1) @ self.how(self.weight).T


ROUNDINGS = {
    "detach": lambda w: w + ((8 * w).round() / 8 - w).detach(),
    "torch's function": lambda w: torch.fake_quantize_per_tensor_affine(w, 0.05, 0, -128, 127),  # of float32 alone
}


@pytest.mark.parametrize("how", ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_straight_through_estimator_in_a_forward_pass_has_no_curvature(how):
    refuses(
        r"^The loss does not change when a tensor of the shape \(3, 64\) .*plain_network",
        curvature,
        Rounded(how).eval(),
    )
    assert curvature(Rounded(lambda w: w).eval()).eigenvalues[0] > 0


def test_models_of_libraries_are_refused_for_curvature_with_the_way_out():
    refuses(r"^'0\.weight_fake_quant' rounds what .* flatlab\.plain_network", curvature, ao(activations=False))
    refuses(r"^The loss does not change when .* flatlab\.plain_network", curvature, brevitas(activations=False))
