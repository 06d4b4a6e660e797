"""Which weights a quantizer takes: every kind of convolution and map, tied ones once, and by name what it leaves."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import flatlab
from flatlab.errors import UserError
from flatlab.quant.attach import attach_each, layers, quantized_layers, scales
from flatlab.quant.calibration import second_moments
from flatlab.quant.codebook import SMALLEST_SCALE
from flatlab.quant.fixed import Fixed
from flatlab.quant.inq import INQ


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Twice(nn.Module):
    """Two layers one after the other, and a head."""

    def __init__(self, first, second, head=None):
        super().__init__()
        self.first, self.second, self.head = first, second, head or nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(self.second(torch.tanh(self.first(inputs))))


# --- kinds -------------------------------------------------------------------------------------------------------

KINDS = {  # a layer, its inputs, the axis of its output channels, and how many there are on it
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), [(5, 4, 11)], 0, 6),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), [(5, 4, 7, 7)], 0, 6),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), [(3, 2, 4, 5, 3)], 0, 3),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), [(5, 4, 7)], 1, 6),
    "transposed 2d in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), [(5, 4, 7, 6)], 1, 3),
    "transposed 2d, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), [(5, 4, 7, 6)], 0, 4),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2), [(3, 2, 3, 3, 3)], 1, 3),
    "linear": (lambda: nn.Linear(4, 6), [(5, 4)], 0, 6),
    "bilinear": (lambda: nn.Bilinear(4, 3, 6), [(5, 4), (5, 3)], 0, 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_two_bits_a_channel_and_bakes_to_the_same_outputs(kind):
    make, shapes, axis, channels = KINDS[kind]
    layer, inputs = nn.ModuleDict({"layer": make()}), [torch.randn(shape) for shape in shapes]
    assert flatlab.attach(layer, bits=2) == ["layer"]
    (scale,) = scales(layer).values()
    assert scale.numel() == channels and scale.shape[axis] == channels
    expected = layer["layer"](*inputs)
    flatlab.bake(layer)
    assert torch.equal(layer["layer"](*inputs), expected)
    assert all(each.unique().numel() <= 4 for each in layer["layer"].weight.movedim(axis, 0))


@pytest.mark.parametrize("make", [INQ, Fixed.empty], ids=["inq", "fixed"])
def test_other_quantizers_follow_the_output_channels_too(make):
    network = nn.Sequential(nn.ConvTranspose1d(4, 6, 3))
    attach_each(network, lambda _, weight, axis: make(weight, bits=3, granularity="channel", axis=axis))
    assert quantized_layers(network)["0"].quantizer.scale.shape == (1, 6, 1)


MAPS = {
    "stride, dilation, groups": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False), (5, 4, 11)),
    "same": (nn.Conv3d(2, 3, 3, padding="same", dilation=(1, 2, 1), bias=False), (3, 2, 4, 5, 3)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular", bias=False), (5, 4, 11, 7)),
    "transposed": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), (5, 4, 7)),
    "transposed in groups": (
        nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1, dilation=(1, 2), groups=2, bias=False),
        (5, 4, 7, 6),
    ),
    "transposed, depthwise": (nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4, bias=False), (5, 4, 7, 6)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, bias=False), (3, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("name", MAPS)
def test_moments_give_each_output_channels_mean_square(name):
    """Calibration's H = 2 X X' / n makes w H w' / 2 the mean square of w X: computed by the layer itself."""
    layer, shape = MAPS[name]
    layer, inputs = copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)
    moments = second_moments(nn.Sequential(layer), [inputs[:2], inputs[2:]])["0"]
    apart = layer.weight.unflatten(0, (layer.groups, -1))
    rows = (apart.transpose(1, 2) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else apart).flatten(3)
    rows = rows.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    found = torch.einsum("goc,gcd,god->go", rows, moments, rows).flatten() / 2
    torch.testing.assert_close(found, layer(inputs).square().transpose(0, 1).flatten(1).mean(1), rtol=1e-12, atol=0)


def test_moments_of_a_bilinear_map():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Bilinear(3, 3, 4, bias=False)

        def forward(self, inputs):
            return self.map(inputs, inputs.flip(1))

    model, inputs = Product().double(), torch.randn(7, 3, dtype=torch.float64)
    moments, rows = second_moments(model, [inputs])["map"], model.map.weight.flatten(1)
    found = torch.einsum("oc,cd,od->o", rows, moments[0], rows) / 2
    torch.testing.assert_close(found, model(inputs).square().mean(0), rtol=1e-12, atol=0)


def test_what_stays_in_floating_point_is_named(caplog):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.reads, self.out = nn.Embedding(9, 4), nn.LSTM(4, 5), nn.Linear(5, 5)
            self.cross, self.head = nn.MultiheadAttention(4, 1, kdim=3), nn.Linear(5, 2)

    with caplog.at_level(logging.WARNING, "flatlab"):
        assert flatlab.attach(Reader()) == ["out", "cross.out_proj"]
    (said,) = caplog.messages
    assert said == (
        "Quantization leaves words.weight, reads.weight_ih_l0, reads.weight_hh_l0, cross.q_proj_weight, "
        "cross.k_proj_weight, cross.v_proj_weight in floating point."
    )


def test_a_network_that_is_quantized_whole_gets_no_remark(caplog):
    flatlab.attach(Twice(nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 6, 3)))
    assert not caplog.messages


DERIVED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "weight_norm of old": lambda: weight_norm(nn.Conv1d(3, 3, 1)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", DERIVED)
def test_a_derived_weight_is_refused_with_what_helps(name):
    network = nn.Sequential(DERIVED[name]())
    with pytest.raises(UserError, match=r"^0\.weight is computed from other parameters, .*remove_parametrizations"):
        flatlab.attach(network)
    assert not quantized_layers(network)


def test_a_lazy_layer_is_refused_until_it_has_a_weight():
    network = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(UserError, match="^0 has no weight before its first input; pass a batch through"):
        flatlab.attach(network)
    network(torch.zeros(1, 2))
    assert flatlab.attach(network) == ["0"]


# --- ties --------------------------------------------------------------------------------------------------------


def tied(kind):
    if kind == "linear":
        network, inputs = Twice(nn.Linear(6, 6), nn.Linear(6, 6, bias=False)), torch.randn(5, 6)
    elif kind == "convolution":
        network = Twice(nn.Conv1d(6, 6, 3, padding=1), nn.ConvTranspose1d(6, 6, 3, padding=1), nn.Linear(4, 3))
        inputs = torch.randn(5, 6, 4)
    else:
        network, inputs = Twice(nn.Embedding(6, 6), nn.Linear(6, 6)), torch.randint(0, 6, (5, 2))
    network.second.weight = network.first.weight
    return network.eval(), inputs


@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding"])
def test_tied_layers_stay_tied_and_count_once(kind, caplog):
    network, inputs = tied(kind)
    plain, keys = [name for name, _ in network.named_parameters()], list(network.state_dict())
    name = "second" if kind == "embedding" else "first"
    assert flatlab.attach(network, bits=3) == list(quantized_layers(network)) == list(scales(network)) == [name]
    assert not caplog.messages
    assert torch.equal(network.first.weight, network.second.weight) and network.first.weight.unique().numel() <= 6 * 8
    assert len(list(network.parameters())) == len(plain) + 1  # one set of step sizes
    expected, again = network(inputs), copy.deepcopy(network)
    assert torch.equal(again(inputs), expected)
    for each in (network, again):
        flatlab.bake(each)
        assert each.first.weight is each.second.weight and torch.equal(each(inputs), expected)
        assert [key for key, _ in each.named_parameters()] == plain and list(each.state_dict()) == keys
    assert network.first.weight is not again.first.weight
    assert list(flatlab.Landscape(network, [(inputs, inputs.flatten(1))], _any_loss, check=False).named) == plain


def _any_loss(outputs, targets):
    return outputs.square().mean()


def test_a_tied_step_size_gets_the_gradient_of_both_places():
    network, inputs = tied("linear")
    flatlab.attach(network, bits=3)
    network(inputs).square().sum().backward()
    (scale,) = scales(network).values()
    both = scale.grad.clone()
    parts = []
    for place in ("first", "second"):
        other = copy.deepcopy(network)
        other.zero_grad()
        held = getattr(other, place)
        frozen = held.weight.detach().clone()
        weight = other.second.weight if place == "first" else other.first.weight
        first, second = (frozen, weight) if place == "first" else (weight, frozen)
        hidden = torch.tanh(F.linear(inputs, first, other.first.bias))
        other.head(F.linear(hidden, second)).square().sum().backward()
        parts.append(next(iter(scales(other).values())).grad)
    torch.testing.assert_close(both, parts[0] + parts[1])


def test_a_weight_that_the_head_holds_too_is_the_heads(caplog):
    network = Twice(nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    network.head.weight = network.first.weight
    assert list(layers(network)) == flatlab.attach(network) == ["second"]
    assert network.head.weight is network.first.weight
    assert caplog.messages == ["Quantization leaves first.weight in floating point."]


def test_activations_are_quantized_at_each_tied_place():
    network, _ = tied("linear")
    assert flatlab.attach_activations(network) == ["first", "second"]


# --- step sizes --------------------------------------------------------------------------------------------------


def trained(guard, **options):
    inputs, targets = torch.randn(64, 6), torch.randint(0, 3, (64,))
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    flatlab.attach(network, bits=2, outside="none", **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
        if guard:
            flatlab.clamp_scales(network)
    return network.eval()


def test_step_sizes_that_pass_below_zero_are_named(caplog):
    network = trained(guard=False)
    below = int((quantized_layers(network)["0"].quantizer.scale <= 0).sum())
    assert below > 0
    flatlab.bake(network)
    assert caplog.messages[0] == (
        f"{below} of 16 step sizes of 0 are not positive: call clamp_scales() after each optimizer step, or "
        "attach with log_scale=True."
    )


@pytest.mark.parametrize("way", [{"guard": True}, {"guard": False, "log_scale": True}])
def test_the_guard_and_the_logarithm_keep_them_positive(way, caplog):
    network = trained(**way)
    assert all((each.quantizer.scale >= SMALLEST_SCALE * 0.99).all() for each in quantized_layers(network).values())
    flatlab.bake(network)
    assert not caplog.messages
