"""LSQ against its equations, torch's native op and dense autograd; attaching and baking against the plain network."""

import copy
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from flatlab.errors import UserError
from flatlab.models.networks import build_network
from flatlab.quant.attach import attach, bake, clamp_scales, quantized_layers, scales
from flatlab.quant.codebook import initial_scale, levels
from flatlab.quant.lsq import LSQ


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def digits_network(*, dtype=torch.float32, seed=0):
    return build_network("digits-cnn", num_classes=10, in_channels=1, seed=seed).to(dtype).eval()


def images(count=8, dtype=torch.float32):
    return gaussian(count, 1, 16, 16, seed=9, dtype=dtype)


# --- the codebook ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(7, True, (-64, 63)), (2, True, (-2, 1)), (16, True, (-32768, 32767)), (8, False, (0, 255))],
)
def test_levels(bits, signed, expected):
    assert levels(bits, signed=signed) == expected


@pytest.mark.parametrize("bits", [1, 17, 7.5])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UserError, match=f"^bits must be an integer from 2 to 16, got {bits}$"):
        LSQ(gaussian(2, 3), bits=bits)


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (5, 3)])
def test_initial_scale_is_the_formula(shape):
    weight = gaussian(*shape)
    scale = initial_scale(weight, 63)
    assert scale.shape == (5,) + (1,) * (len(shape) - 1)
    for channel, value in zip(weight, scale.flatten(), strict=True):
        assert value.item() == pytest.approx(2 * channel.abs().mean().item() / math.sqrt(63), rel=1e-14)
    whole = initial_scale(weight, 63, granularity="tensor")
    assert whole.shape == ()
    assert whole.item() == pytest.approx(2 * weight.abs().mean().item() / math.sqrt(63), rel=1e-14)


def test_a_channel_of_zeros_stays_zero_and_finite():
    weight = gaussian(3, 4)
    weight[1] = 0
    quantizer = LSQ(weight)
    assert quantizer.scale[1].item() == 1e-8
    assert torch.equal(quantizer(weight)[1], torch.zeros(4, dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad(quantizer(weight).sum(), quantizer.scale)[0]).all()


# --- the quantizer's values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 16])
def test_values_lie_on_the_grid_and_are_near(bits, granularity):
    weight = gaussian(6, 40, 3, 3)
    quantizer = LSQ(weight, bits=bits, granularity=granularity)
    quantized, codes = quantizer(weight), quantizer.codes(weight)
    low, high = quantizer.levels
    assert codes.dtype == torch.int32
    assert low <= codes.min() and codes.max() <= high
    assert torch.equal(quantized, codes * quantizer.scale)
    assert all(channel.unique().numel() <= 2**bits for channel in quantized)
    ratio = weight / quantizer.scale
    within = (low < ratio) & (ratio < high)
    half = (quantizer.scale / 2 * (1 + 1e-12)).expand_as(weight)
    assert ((quantized - weight).abs() <= half)[within].all()
    assert torch.equal(quantizer(quantized), quantized)


def test_sixteen_bits_reproduce_the_logits():
    network = digits_network()
    plain = network(images())
    attach(network, bits=16)
    assert not torch.equal(network(images()), plain)
    torch.testing.assert_close(network(images()), plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_and_nothing_is_attached(broken):
    network = digits_network()
    with torch.no_grad():
        network.features[4].weight[0, 0, 0, 0] = broken
    with pytest.raises(UserError, match=r"features\.4\.weight holds 1 of 4608 values that are not finite"):
        attach(network)
    assert not any(parametrize.is_parametrized(module) for module in network.modules())


@pytest.mark.parametrize("option", [{"granularity": "row"}, {"grad_scale": "chanel"}])
def test_unknown_options_are_refused(option):
    with pytest.raises(UserError, match="nown: "):
        LSQ(gaussian(2, 3), **option)


# --- its gradients -----------------------------------------------------------------------------------------------


def gradients(quantizer, weight):
    """Return dw_q / dw, and dw_q / ds before it is summed over the weights that share s."""
    weight = weight.clone().requires_grad_()
    single = torch.func.jacrev(lambda scale: torch.func.functional_call(quantizer, {"scale": scale}, (weight,)))
    (to_weight,) = torch.autograd.grad(quantizer(weight).sum(), weight)
    return to_weight, single(quantizer.scale.detach())


@pytest.mark.parametrize(
    ("ratio", "to_weight", "to_scale"),
    [
        (-5.0, 0, -4), (-4.3, 0, -4), (-4.0, 0, -4),  # at and below -Q_N
        (-3.9, 1, -0.1), (-1.3, 1, 0.3), (0.0, 1, 0.0), (1.3, 1, -0.3), (2.6, 1, 0.4),
        (3.0, 0, 3), (3.2, 0, 3), (9.0, 0, 3),  # at and above Q_P
    ],
)  # fmt: skip
def test_gradients_are_lsqs(ratio, to_weight, to_scale):
    weight = torch.tensor([[ratio / 2]], dtype=torch.float64)
    quantizer = LSQ(weight, bits=3, granularity="tensor", grad_scale="none")
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    found_weight, found_scale = gradients(quantizer, weight)
    assert found_weight.item() == to_weight
    assert found_scale.item() == pytest.approx(to_scale, abs=1e-15)


def test_finite_difference_of_the_step_size_away_from_thresholds():
    # The values jump at thresholds; between them w_q = s code, and the straight-through estimator takes -w / s, the
    # part of the slope that comes from the code's argument, off the weights that are not clipped.
    weight = gaussian(400, 1)
    quantizer = LSQ(weight / 2, bits=3, granularity="tensor", grad_scale="none")  # clips more than at its start
    ratio = (weight / quantizer.scale).detach()
    low, high = quantizer.levels
    away = ((ratio - ratio.floor() - 0.5).abs() > 1e-3) & ((ratio - low).abs() > 1e-3) & ((ratio - high).abs() > 1e-3)
    step = 1e-7
    values = []
    for sign in (1, -1):
        shifted = copy.deepcopy(quantizer)
        with torch.no_grad():
            shifted.scale += sign * step
        values.append(shifted(weight).detach())
    difference = (values[0] - values[1]) / (2 * step)
    inside = (low < ratio) & (ratio < high)
    _, slope = gradients(quantizer, weight)
    assert away.sum() > 380 and (~inside)[away].sum() > 5
    torch.testing.assert_close(slope[away], (difference - torch.where(inside, ratio, 0.0))[away], atol=1e-6, rtol=0)


def test_eulers_identity_of_a_function_of_degree_one():
    weight = gaussian(5, 30)
    quantizer = LSQ(weight, bits=3, grad_scale="none")
    to_weight, to_scale = gradients(quantizer, weight)
    along_scale = torch.einsum("ijkl,kl->ij", to_scale, quantizer.scale)
    torch.testing.assert_close(to_weight * weight + along_scale, quantizer(weight), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("grad_scale", "granularity", "count"),
    [("shared", "channel", 18), ("shared", "tensor", 72), ("tensor", "channel", 72), ("tensor", "tensor", 72)],
)
def test_gradient_scale(grad_scale, granularity, count):
    weight = gaussian(4, 2, 3, 3)
    scaled = LSQ(weight, granularity=granularity, grad_scale=grad_scale)
    plain = LSQ(weight, granularity=granularity, grad_scale="none")
    assert torch.equal(scaled(weight), plain(weight))
    found, whole = (torch.autograd.grad(each(weight).sum(), each.scale)[0] for each in (scaled, plain))
    torch.testing.assert_close(found, whole / math.sqrt(count * 63), rtol=1e-10, atol=0)


@pytest.mark.oracle
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_torchs_native_op_agrees_outside_the_half_step_bands_and_differs_inside(bits):
    weight = gaussian(8, 500, dtype=torch.float32).requires_grad_()
    quantizer = LSQ(weight, bits=bits, grad_scale="none")
    low, high = quantizer.levels
    with torch.no_grad():
        quantizer.scale.copy_(torch.linspace(1.5, 2.5, 8).unsqueeze(1) / high)  # clips at about two sigma
    scale = quantizer.scale.detach().flatten().requires_grad_()
    native = torch._fake_quantize_learnable_per_channel_affine(weight, scale, torch.zeros(8), 0, low, high, 1.0)
    ours = quantizer(weight)
    torch.testing.assert_close(ours, native, atol=0, rtol=1e-6)

    ratio = (weight / quantizer.scale).detach()
    # torch looks at the rounded value to tell who is clipped, LSQ at the value itself.
    band = ((ratio >= high) & (ratio < high + 0.5)) | ((ratio > low - 0.5) & (ratio <= low))
    (ours_weight,) = torch.autograd.grad(ours.sum(), weight, retain_graph=True)
    (native_weight,) = torch.autograd.grad(native.sum(), weight, retain_graph=True)
    assert torch.equal(ours_weight[~band], native_weight[~band])
    assert band.any()
    assert (ours_weight[band] == 0).all() and (native_weight[band] == 1).all()

    outside = (~band).float()
    (ours_scale,) = torch.autograd.grad((ours * outside).sum(), quantizer.scale)
    (native_scale,) = torch.autograd.grad((native * outside).sum(), scale)
    torch.testing.assert_close(ours_scale.flatten(), native_scale, atol=1e-3, rtol=1e-5)


def test_second_derivatives_are_those_of_the_loss_behind():
    weight = gaussian(2, 3).requires_grad_()
    quantizer = LSQ(weight.detach(), bits=3, grad_scale="none")
    target = gaussian(2, 3, seed=1)

    def loss(weight, scale):
        quantized = torch.func.functional_call(quantizer, {"scale": scale}, (weight,))
        return ((quantized - target) ** 4).sum()

    inputs = (weight, quantizer.scale)
    gradient = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    direction = (gaussian(2, 3, seed=2), gaussian(2, 1, seed=3))
    inner = sum((each * along).sum() for each, along in zip(gradient, direction, strict=True))
    found = torch.cat([each.flatten() for each in torch.autograd.grad(inner, inputs)])

    to_weight, to_scale = gradients(quantizer, weight.detach())
    jacobian = torch.cat([torch.diag(to_weight.flatten()), to_scale.reshape(6, 2)], dim=1)
    curvature = 12 * (quantizer(weight).detach() - target).flatten() ** 2
    flat = torch.cat([each.flatten() for each in direction])
    torch.testing.assert_close(found, jacobian.T @ (curvature * (jacobian @ flat)))


# --- attaching ---------------------------------------------------------------------------------------------------


def train_steps(network, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images()), torch.arange(8)).backward()
        optimizer.step()
        clamp_scales(network)


def test_attach_quantizes_every_convolution_and_nothing_else():
    network = digits_network()
    names = attach(network)
    assert names == ["features.0", "features.4", "features.8"]
    assert list(quantized_layers(network)) == list(scales(network)) == names
    assert not parametrize.is_parametrized(network.head)
    assert [scale.shape for scale in scales(network).values()] == [(16, 1, 1, 1), (32, 1, 1, 1), (64, 1, 1, 1)]


def test_nothing_to_quantize_is_refused():
    with pytest.raises(UserError, match="^Nothing to quantize: the network holds no convolution or linear map outside"):
        attach(nn.Sequential(OrderedDict(norm=nn.BatchNorm1d(3), head=nn.Linear(3, 2))))


def test_attaching_twice_is_refused():
    network = digits_network()
    attach(network)
    with pytest.raises(UserError, match=r"features\.0 is parametrized already; call bake"):
        attach(network)


def test_latent_weights_stay_the_same_objects_and_keep_their_moments():
    network = digits_network().train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    train_steps(network, optimizer)
    before = dict(network.named_parameters())
    moments = {key: state["exp_avg"].clone() for key, state in optimizer.state.items()}
    attach(network)
    after = {name: each for name, each in network.named_parameters() if not name.endswith("weight.0.scale")}
    assert {id(each) for each in after.values()} == {id(each) for each in before.values()}
    assert network.features[0].parametrizations["weight"].original is before["features.0.weight"]
    assert all(torch.equal(optimizer.state[each]["exp_avg"], moments[each]) for each in after.values())

    optimizer.add_param_group({"params": list(scales(network).values()), "lr": 1e-5})
    frozen = {name: each.detach().clone() for name, each in network.named_parameters()}
    train_steps(network, optimizer, count=1)
    assert all(not torch.equal(each, frozen[name]) for name, each in network.named_parameters())
    assert all(state["step"] == 4 for key, state in optimizer.state.items() if key in moments)


def test_clamp_scales_raises_those_below_the_floor_only():
    network = digits_network()
    attach(network)
    first = scales(network)["features.0"]
    kept = first.detach().clone()
    with torch.no_grad():
        first[3] = -1.0
    clamp_scales(network)
    kept[3] = 1e-8
    assert torch.equal(first, kept)
    assert first.requires_grad and first.is_leaf


def test_deepcopy_and_state_dict_round_trip():
    network = digits_network().train()
    attach(network, bits=4)
    train_steps(network, torch.optim.Adam(network.parameters(), lr=1e-2))
    network.eval()
    fresh = digits_network(seed=1)
    attach(fresh, bits=4)
    fresh.load_state_dict(network.state_dict())
    for other in (copy.deepcopy(network), fresh):
        assert torch.equal(other(images()), network(images()))
        assert not {id(each) for each in other.parameters()} & {id(each) for each in network.parameters()}


def test_float64_runs_throughout():
    network = digits_network(dtype=torch.float64)
    attach(network)
    logits = network(images(dtype=torch.float64))
    logits.sum().backward()
    assert logits.dtype == torch.float64
    assert all(scale.grad.dtype == torch.float64 for scale in scales(network).values())


# --- baking ------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
        self.head = nn.Linear(2 * 14 * 14, 3)

    def forward(self, inputs):
        return self.head(self.features(inputs))


@pytest.mark.parametrize("build", [digits_network, Biased])
def test_bake_gives_a_plain_network_of_the_same_outputs(build):
    torch.manual_seed(0)
    network = build().to(memory_format=torch.channels_last).eval()
    plain = {name: each.shape for name, each in network.named_parameters()}
    keys = list(network.state_dict())
    names = attach(network, bits=4)
    expected = network(images())
    values = {name: layer.weight.detach().clone() for name, (layer, _) in quantized_layers(network).items()}
    bake(network)

    assert torch.equal(network(images()), expected)
    assert list(network.state_dict()) == keys
    assert [(name, each.shape) for name, each in network.named_parameters()] == list(plain.items())
    assert not quantized_layers(network)
    for name in names:
        layer = network.get_submodule(name)
        assert type(layer) is nn.Conv2d
        assert torch.equal(layer.weight, values[name])
        assert type(layer.weight) is nn.Parameter and layer.weight.is_leaf and layer.weight.requires_grad
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_baking_a_copy_leaves_the_original_quantized():
    network = digits_network()
    attach(network, bits=3)
    expected = network(images())
    baked = copy.deepcopy(network)
    bake(baked)
    assert list(quantized_layers(network)) == ["features.0", "features.4", "features.8"]
    assert torch.equal(network(images()), expected) and torch.equal(baked(images()), expected)
    assert baked.features[0].weight.data_ptr() != network.features[0].parametrizations["weight"].original.data_ptr()


def test_a_baked_network_can_be_quantized_again_without_a_change():
    network = digits_network()
    attach(network)
    kept = {name: scale.detach().clone() for name, scale in scales(network).items()}
    bake(network)
    expected = network(images())
    attach(network)
    with torch.no_grad():
        for name, scale in scales(network).items():
            scale.copy_(kept[name])
    assert torch.equal(network(images()), expected)
