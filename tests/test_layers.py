"""Which layers are quantized: linear maps and attention as convolutions; options of LSQ; inputs; baking them."""

import copy
import math

import pytest
import torch
from cases import ViTBlock, make
from torch import nn

from flatlab.errors import UserError
from flatlab.quant.attach import (
    attach,
    attach_activations,
    attach_each,
    bake,
    clamp_scales,
    layers,
    quantized_layers,
    scales,
)
from flatlab.quant.inq import INQ
from flatlab.quant.lsq import LSQ, Activations

VIT = ["patches", "block.self_attn", "block.self_attn.out_proj", "block.linear1", "block.linear2"]


def weight_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- a vision transformer's block --------------------------------------------------------------------------------


def test_a_vit_block_is_quantized_whole_but_for_its_head():
    case = make("vit")
    plain = case.model(case.inputs)
    assert attach(case.model, bits=4) == VIT
    found = quantized_layers(case.model)
    assert list(found) == list(scales(case.model)) == VIT
    assert found["block.self_attn"].quantizer.scale.shape == (24, 1)  # q, k and v of 8 rows each
    for layer in found.values():
        assert all(len(row.unique()) <= 16 for row in layer.weight.flatten(1))
        assert not torch.equal(layer.weight, layer.latent)
    quantized = case.model(case.inputs)
    assert not torch.allclose(quantized, plain, atol=1e-4)
    quantized.sum().backward()
    assert all(scale.grad is not None and scale.grad.abs().sum() > 0 for scale in scales(case.model).values())


def test_sixteen_bits_of_a_vit_block_reproduce_its_logits():
    case = make("vit")
    plain = case.model(case.inputs)
    attach(case.model, bits=16)
    with torch.no_grad():  # LSQ's own start uses a few hundred of the 65,536 levels
        for layer in quantized_layers(case.model).values():
            layer.quantizer.scale.copy_(layer.latent.abs().flatten(1).amax(1).view_as(layer.quantizer.scale) / 32767)
    torch.testing.assert_close(case.model(case.inputs), plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("grad", [True, False])  # without gradients torch takes its fused path through the block
def test_a_baked_vit_block_has_the_same_outputs_names_and_order(grad):
    case = make("vit")
    plain = [(name, each.shape) for name, each in case.model.named_parameters()]
    keys = list(case.model.state_dict())
    attach(case.model, bits=4)
    with torch.set_grad_enabled(grad):
        expected = case.model(case.inputs)
        bake(case.model)
        assert torch.equal(case.model(case.inputs), expected)
    assert [(name, each.shape) for name, each in case.model.named_parameters()] == plain
    assert list(case.model.state_dict()) == keys and not quantized_layers(case.model)
    assert type(case.model.block.self_attn) is nn.MultiheadAttention


def test_tied_weights_share_their_step_sizes():
    case = make("tied")
    assert attach(case.model) == list(scales(case.model)) == ["first"]
    assert case.model.first.parametrizations.weight[0] is case.model.second.parametrizations.weight[0]


def test_what_is_left_out_can_be_named():
    sequential = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert attach(sequential, outside="2") == ["0"]
    with pytest.raises(UserError, match=r"^Nothing to quantize: .* outside of its '0'\.$"):
        layers(nn.Sequential(nn.Linear(2, 2)), outside="0")


def test_a_nan_in_attention_is_named_and_nothing_is_attached():
    case = make("vit")
    with torch.no_grad():
        case.model.block.self_attn.in_proj_weight[3, 2] = math.nan
    with pytest.raises(UserError, match=r"^block\.self_attn\.in_proj_weight holds 1 of 192 values that are not finite"):
        attach(case.model)
    assert not quantized_layers(case.model)


# --- unsigned codes, and logarithms of step sizes -----------------------------------------------------------------


def test_unsigned_codes_clip_what_is_negative():
    weight = weight_of(3, 50)
    quantizer = LSQ(weight, bits=3, signed=False)
    assert quantizer.levels == (0, 7)
    quantized, codes = quantizer(weight), quantizer.codes(weight)
    assert torch.equal(quantized[weight <= 0], torch.zeros_like(weight)[weight <= 0])
    assert codes.min() == 0 and codes.max() >= 4
    assert torch.equal(quantized, codes * quantizer.scale)


def test_a_logarithmic_step_size_is_the_same_grid_with_relative_gradients():
    weight = weight_of(4, 30)
    plain, logarithmic = LSQ(weight, bits=3), LSQ(weight, bits=3, log_scale=True)
    torch.testing.assert_close(logarithmic.scale, plain.scale.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(logarithmic(weight), plain(weight), rtol=1e-13, atol=0)
    (relative,) = torch.autograd.grad(logarithmic(weight).square().sum(), logarithmic.learned)
    (absolute,) = torch.autograd.grad(plain(weight).square().sum(), plain.learned)
    torch.testing.assert_close(relative, absolute * plain.scale.detach(), rtol=1e-10, atol=1e-15)


def test_a_logarithmic_step_size_stays_positive_and_bakes():
    case = make("conv_bn")
    attach(case.model, bits=4, log_scale=True, outside="7")
    with torch.no_grad():
        for scale in scales(case.model).values():
            scale.sub_(3.0)  # would carry the step size itself far below zero
    clamp_scales(case.model)
    for _, quantizer in quantized_layers(case.model).values():
        assert (quantizer.scale > 0).all()
    expected = case.model(case.inputs)
    twin = copy.deepcopy(case.model)
    bake(twin)
    assert torch.equal(twin(case.inputs), expected) and torch.equal(case.model(case.inputs), expected)


# --- activations ---------------------------------------------------------------------------------------------------


def test_activations_are_quantized_from_the_first_training_batch_on():
    case = make("conv_bn")
    plain = case.model(case.inputs)
    names = attach_activations(case.model, bits=3, signed=True, outside="7")
    assert names == ["0", "3"]
    assert torch.equal(case.model(case.inputs), plain)  # not before training has shown a batch
    case.model.train()
    case.model(case.inputs)
    case.model.eval()
    first = case.model[0].activations
    assert first.levels == (-4, 3)
    assert first.scale.item() == pytest.approx(2 * case.inputs.abs().mean().item() / math.sqrt(3), rel=1e-6)
    seen = first(case.inputs)
    assert seen.unique().numel() <= 8
    assert torch.equal(seen, torch.clamp(case.inputs / first.scale, -4, 3).round() * first.scale)
    loaded = make("conv_bn").model
    attach_activations(loaded, bits=3, signed=True, outside="7")
    loaded.load_state_dict(case.model.state_dict())
    assert torch.equal(loaded(case.inputs), case.model(case.inputs))
    assert set(scales(case.model)) == {"0.activations", "3.activations"}


def test_an_inputs_gradient_is_lsqs():
    quantizer = Activations(bits=2, signed=False).train()
    inputs = torch.tensor([[-1.0, 0.2, 0.9, 9.0]], requires_grad=True)
    quantizer(inputs)
    with torch.no_grad():
        quantizer.scale.fill_(0.5)
    quantizer(inputs).sum().backward()
    assert inputs.grad.tolist() == [[0.0, 1.0, 0.0 if 0.9 / 0.5 >= 3 else 1.0, 0.0]]
    slope = 0 + (0 - 0.4) + (2 - 1.8) + 3
    assert quantizer.scale.grad.item() == pytest.approx(slope / math.sqrt(4 * 3), rel=1e-6)


def test_inputs_that_are_not_rounded_are_clipped_to_the_range_of_their_codes():
    inputs = torch.tensor([[-1.0, 0.2, 0.9, 9.0]], requires_grad=True)
    for signed, expected in {False: [0.0, 0.2, 0.9, 1.5], True: [-1.0, 0.2, 0.5, 0.5]}.items():
        quantizer = Activations(bits=2, signed=signed, start="one")
        with torch.no_grad():
            quantizer.scale.fill_(0.5)
        (rounded,) = torch.autograd.grad(quantizer(inputs).sum(), inputs)
        assert quantizer.straight_through
        quantizer.rounded = False
        assert not quantizer.straight_through
        clipped = quantizer(inputs)
        assert clipped.tolist() == [pytest.approx(expected)]
        (slopes,) = torch.autograd.grad(clipped.sum(), inputs)
        assert slopes[0, 1] == rounded[0, 1] == 1 and slopes[0, 3] == rounded[0, 3] == 0


def test_attention_keeps_its_inputs_and_the_rest_of_the_block_does_not():
    model = ViTBlock()
    assert attach_activations(model) == ["patches", "block.linear1", "block.linear2"]


def test_baking_leaves_activations_quantized_and_their_step_sizes_frozen():
    case = make("conv_bn")
    attach(case.model, bits=4, outside="7")
    attach_activations(case.model, bits=4, signed=True, outside="7")
    case.model.train()
    case.model(case.inputs)
    case.model.eval()
    expected = case.model(case.inputs)
    bake(case.model)
    assert torch.equal(case.model(case.inputs), expected)
    assert not any(scale.requires_grad for scale in scales(case.model).values())


def test_curvature_through_rounded_activations_is_refused():
    case = make("conv_bn")
    attach_activations(case.model, outside="7")
    for scale in scales(case.model).values():
        scale.requires_grad_(False)
    landscape = case.landscape()
    with pytest.raises(UserError, match=r"^'0\.activations' rounds activations: autograd differentiates straight"):
        landscape.hvp(torch.ones(landscape.num_params))


# --- INQ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.75, 0.875, 1.0])
def test_inq_freezes_the_largest_share_to_one_weight(share):
    weight = weight_of(7, 3, 3, 3)
    quantizer = INQ(weight, bits=4)
    quantizer.advance(weight, share)
    assert int(quantizer.frozen.sum()) == round(share * weight.numel())
    if share < 1:
        assert weight.abs()[quantizer.frozen].min() >= weight.abs()[~quantizer.frozen].max()
    out = quantizer(weight)
    assert torch.equal(out[~quantizer.frozen], weight[~quantizer.frozen])
    half = (quantizer.scale / 2 * (1 + 1e-12)).expand_as(weight)
    assert ((out - weight).abs() <= half).all()


def test_inqs_frozen_weights_stay_to_the_bit_and_have_no_gradient():
    weight = weight_of(5, 40)
    quantizer = INQ(weight, bits=4)
    quantizer.advance(weight, 0.5)
    before, frozen = quantizer(weight), quantizer.frozen.clone()
    moved = (weight + 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(quantizer(moved).sum(), moved)
    assert torch.equal(gradient, (~frozen).double())
    quantizer.advance(moved, 0.75)
    assert torch.equal(quantizer(moved)[frozen], before[frozen]) and (quantizer.frozen & frozen).sum() == frozen.sum()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_inqs_uniform_grid_is_a_linspace(bits, granularity):
    weight = weight_of(4, 60)
    quantizer = INQ(weight, bits=bits, granularity=granularity)
    quantizer.advance(weight, 1.0)
    for row, out in zip(weight, quantizer(weight), strict=True):
        widest = (row if granularity == "channel" else weight).abs().max()
        grid = torch.linspace(-widest, widest, 2**bits - 1, dtype=torch.float64)
        nearest = grid[(row.unsqueeze(1) - grid).abs().argmin(1)]
        torch.testing.assert_close(out, nearest, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_inqs_powers_of_two_are_the_papers(bits):
    weight = weight_of(1, 400, seed=bits)
    quantizer = INQ(weight, bits=bits, grid="power-of-two")
    quantizer.advance(weight, 1.0)
    first = math.floor(math.log2(4 * weight.abs().max().item() / 3))
    last = first + 1 - 2 ** (bits - 1) // 2
    powers = [2.0**n for n in range(last, first + 1)]
    expected = []
    for value in weight[
        0
    ].tolist():  # Zhou et al., Eq. 4: alpha, beta neighbours, (alpha + beta) / 2 <= |w| < 3 beta / 2
        level = 0.0
        for below, beta in zip([0.0, *powers], powers, strict=False):
            if (below + beta) / 2 <= abs(value) < 3 * beta / 2:
                level = math.copysign(beta, value)
        expected.append(level)
    assert quantizer(weight)[0].tolist() == expected
    codes = quantizer.codes(weight)
    assert codes.abs().max() <= quantizer.levels[1] == 2 ** (bits - 2)


def test_inq_of_zeros_stays_zero_and_its_mistakes_are_sentences():
    weight = weight_of(3, 4)
    weight[1] = 0
    for grid in ("uniform", "power-of-two"):
        quantizer = INQ(weight, bits=4, grid=grid)
        quantizer.advance(weight, 1.0)
        assert torch.equal(quantizer(weight)[1], torch.zeros(4, dtype=torch.float64))
        assert torch.isfinite(quantizer(weight)).all()
    with pytest.raises(UserError, match=r"^A grid of powers of two must have 2 to 8 bits, got 9"):
        INQ(weight, bits=9, grid="power-of-two")
    with pytest.raises(UserError, match="^bits must be an integer from 2 to 16, got 17$"):
        INQ(weight, bits=17)
    with pytest.raises(UserError, match="^Unknown grid 'unifrom'"):
        INQ(weight, grid="unifrom")


def test_inq_can_stand_in_a_network_and_be_baked():
    case = make("vit")
    assert attach_each(case.model, lambda _, weight, axis: INQ(weight, bits=5, axis=axis)) == VIT
    for layer in quantized_layers(case.model).values():
        layer.quantizer.advance(layer.latent, 1.0)
    expected = case.model(case.inputs)
    bake(case.model)
    assert torch.equal(case.model(case.inputs), expected)
