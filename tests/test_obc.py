"""OBC against brute force, round-to-nearest and its diagonal case; what calibration sees against unfolding by hand."""

import math

import pytest
import torch
from cases import MODELS, make
from torch import nn

from flatlab.errors import UserError
from flatlab.quant.attach import layers, tensor_of
from flatlab.quant.calibration import second_moments
from flatlab.quant.codebook import SMALLEST_SCALE, searched_scale
from flatlab.quant.obc import obc


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(columns, samples=400, *, groups=1, seed=1):
    """Second moments of inputs that hang together, as those of neighbouring pixels do."""
    inputs = gaussian(groups, columns, samples, seed=seed).cumsum(1) + gaussian(groups, columns, samples, seed=seed + 1)
    return 2 * inputs @ inputs.mT / samples


def nearest(weight, scale, bits):
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


# --- the step size -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_the_searched_step_size_is_the_best_of_its_grid(bits, granularity):
    weight = gaussian(5, 60)
    scale = searched_scale(weight, bits, granularity=granularity)
    for index, row in enumerate(weight if granularity == "channel" else [weight]):
        widest = row.abs().max().item() * 2 / (2**bits - 1)
        tried = [widest * hundredths / 100 for hundredths in range(100, 19, -1)]
        errors = [(nearest(row, each, bits) * each - row).abs().pow(2.4).sum().item() for each in tried]
        found = scale.flatten()[index].item()
        assert found == pytest.approx(tried[errors.index(min(errors))], rel=1e-12)


def test_a_channel_of_zeros_has_the_smallest_step_size():
    weight = gaussian(3, 5)
    weight[1] = 0
    assert searched_scale(weight, 7).flatten()[1] == SMALLEST_SCALE
    found = obc(weight, correlated(5))
    assert not found.codes[1].any() and torch.isfinite(found.errors).all()


# --- OBC -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact_columns", [300, 0], ids=["exact", "fixed"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_a_diagonal_hessian_is_round_to_nearest(bits, exact_columns):
    weight = gaussian(6, 4, 3, 3)
    diagonal = torch.diag(gaussian(36, seed=2).square() + 0.1).unsqueeze(0)
    found = obc(weight, diagonal, bits=bits, exact_columns=exact_columns)
    assert torch.equal(found.codes, nearest(weight, found.scale, bits))
    assert found.rows_worse == 0 and torch.allclose(found.errors, found.nearest, rtol=1e-12)


@pytest.mark.parametrize(("order", "exact_columns"), [("exact", 300), ("fixed", 0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_the_layers_error_is_lower_than_by_rounding(bits, order, exact_columns):
    weight, moments = gaussian(24, 27), correlated(27)
    found = obc(weight, moments, bits=bits, exact_columns=exact_columns)
    assert found.order == order
    assert found.errors.sum() < 0.7 * found.nearest.sum()
    worse = (found.errors > found.nearest * (1 + 1e-9)).sum().item()
    assert found.rows_worse == worse == found.facts()["rows_worse"] < 6  # greedy: a row may lose, a layer does not
    difference = found.codes * found.scale - weight
    torch.testing.assert_close(found.errors, torch.einsum("ri,ij,rj->r", difference, moments[0], difference))
    assert found.codes.min() >= -(2 ** (bits - 1)) and found.codes.max() <= 2 ** (bits - 1) - 1


def test_rows_that_are_worse_are_counted():
    weight, moments = gaussian(200, 4, seed=3), correlated(4, seed=5)
    found = obc(weight, moments, bits=2)
    assert 0 < found.rows_worse < 40 and found.errors.sum() < found.nearest.sum()


def test_each_row_is_quantized_by_the_published_greedy_rule():
    """By hand, a row at a time, the Hessian of what is left inverted anew after each weight."""
    weight, moments, bits = gaussian(8, 7), correlated(7), 3
    found = obc(weight, moments, bits=bits, damping=0.0)
    for row, scale, codes in zip(weight, found.scale.flatten(), found.codes, strict=True):
        w, left, expected = row.clone(), list(range(7)), torch.zeros(7, dtype=torch.float64)
        while left:
            inverse = torch.linalg.inv(moments[0][left][:, left])
            error = {p: (w[p] - nearest(w[p], scale, bits) * scale).item() for p in left}
            cost = {p: error[p] ** 2 / inverse[i, i].item() for i, p in enumerate(left)}
            far = max(left, key=lambda p: abs(error[p]))  # noqa: B023
            chosen = far if abs(error[far]) > scale / 2 + 1e-9 else min(left, key=cost.__getitem__)
            i = left.index(chosen)
            expected[chosen] = nearest(w[chosen], scale, bits)
            w[left] -= inverse[:, i] * error[chosen] / inverse[i, i]
            left.remove(chosen)
        assert codes.tolist() == expected.tolist()


def test_rows_in_small_portions_are_the_same(monkeypatch):
    weight, moments = gaussian(9, 12), correlated(12)
    whole = obc(weight, moments, bits=3)
    monkeypatch.setattr("flatlab.quant.obc.AT_ONCE", 2 * [2 * 12 * 12])
    assert torch.equal(obc(weight, moments, bits=3).codes, whole.codes)


def test_groups_are_quantized_each_by_its_own_inputs():
    weight, moments = gaussian(6, 9), correlated(9, groups=3)
    whole = obc(weight, moments, bits=3)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        alone = obc(weight[rows], moments[group : group + 1], bits=3)
        assert torch.equal(whole.codes[rows], alone.codes)


@pytest.mark.parametrize("exact_columns", [300, 0])
def test_inputs_that_are_always_zero_get_zero_weights(exact_columns):
    moments = correlated(8)
    moments[:, 2, :] = moments[:, :, 2] = 0
    found = obc(gaussian(5, 8), moments, exact_columns=exact_columns)
    assert not found.codes[:, 2].any() and torch.isfinite(found.errors).all()


@pytest.mark.parametrize("exact_columns", [300, 0])
def test_fewer_samples_than_columns_are_enough(exact_columns):
    moments = correlated(20, samples=5)
    for damping in (0.01, 0.0):
        found = obc(gaussian(6, 20), moments, bits=3, damping=damping, exact_columns=exact_columns)
        assert torch.isfinite(found.errors).all() and found.errors.sum() < found.nearest.sum()


def test_moments_that_do_not_fit_and_weights_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match=r"^The weight holds 24 of 24 values that are not finite"):
        obc(math.nan * gaussian(4, 6), correlated(6))
    with pytest.raises(
        UserError, match=r"^Calibration moments of shape \(1, 5, 5\) do not fit a weight of shape \(4, 6\)"
    ):
        obc(gaussian(4, 6), correlated(5))


# --- calibration ---------------------------------------------------------------------------------------------------


class Convolutions(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = nn.Conv2d(4, 8, 3, bias=False, **options)

    def forward(self, inputs):
        return self.layer(inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"groups": 2, "padding": (1, 0)},
        {"groups": 4, "stride": (1, 2)},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_a_convolutions_moments_give_the_norm_of_its_outputs(options):
    """||W X||^2 = tr(W H W') n / 2, group by group: the convolution itself is the oracle."""
    model = Convolutions(**options).double()
    inputs = gaussian(6, 4, 9, 8)
    moments = second_moments(model, inputs.split([4, 2]))["layer"]
    groups = options.get("groups", 1)
    assert moments.shape == (groups, 4 // groups * 9, 4 // groups * 9)
    outputs = model(inputs)
    weight = model.layer.weight.reshape(groups, 8 // groups, -1)
    energy = torch.einsum("gri,gij,grj->gr", weight, moments, weight).flatten()
    torch.testing.assert_close(energy, 2 * outputs.square().mean((0, 2, 3)))


def test_a_vit_block_shows_all_its_layers(untouched):
    case = make("vit").double()
    with untouched(case.model):
        moments = second_moments(case.model, [case.inputs])
    assert list(moments) == list(layers(case.model)) and "block.self_attn.out_proj" in moments
    tokens = (case.model.patches(case.inputs).flatten(2).mT + case.model.position).reshape(-1, 8)
    torch.testing.assert_close(moments["block.self_attn"][0], 2 * tokens.mT @ tokens / len(tokens))
    mixed = case.model.block.self_attn(*3 * [tokens.view(24, 4, 8)])[0].reshape(-1, 8)
    out = case.model.block.self_attn.out_proj
    centred = mixed - out.bias
    energy = torch.einsum("ri,ij,rj->r", out.weight, moments["block.self_attn.out_proj"][0], out.weight)
    torch.testing.assert_close(energy, 2 * centred.square().mean(0))


def test_moments_do_not_depend_on_how_the_data_are_cut(monkeypatch):
    case = make("conv_bn").double()
    whole = second_moments(case.model, [case.inputs], outside="7")
    monkeypatch.setattr("flatlab.quant.calibration.COLUMNS", 1)
    parts = second_moments(case.model, case.inputs.split([5, 1, 18]), outside="7")
    for name, moments in whole.items():
        torch.testing.assert_close(parts[name], moments, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact_columns", [300, 0], ids=["exact", "fixed"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "mlp"])
def test_each_layers_output_moves_less_than_by_rounding(name, exact_columns):
    case = make(name).double()
    outside = "7" if name.startswith("conv") else "head"
    moments, ratios = second_moments(case.model, [case.inputs], outside=outside), []
    for key, layer in layers(case.model, outside=outside).items():
        weight = getattr(layer, tensor_of(layer)).detach()
        found = obc(weight, moments[key], bits=4, exact_columns=exact_columns)
        assert found.codes.shape == weight.shape
        ratios.append(float(found.errors.sum() / found.nearest.sum()))
    assert max(ratios) <= 1 + 1e-9  # equal where inputs are white noise, whose moments are nearly diagonal
    assert min(ratios) < 0.97 or name == "tied"


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (torch.zeros(4, 3, 9, 9), r"^Calibration inputs of shape \(4, 3, 9, 9\) do not fit the network: "),
        ((torch.zeros(2, 1, 8, 8), 1), r"^Calibration data must be batches .*got a tuple\.$"),
        (torch.full((2, 1, 8, 8), math.nan), r"^Calibration inputs of 0 are not finite"),
    ],
    ids=["shape", "kind", "nan"],
)
def test_calibration_data_that_do_not_do(batch, sentence, untouched):
    case = make("conv_bn")
    with untouched(case.model), pytest.raises(UserError, match=sentence) as caught:
        second_moments(case.model, [batch], outside="7")
    assert "\n" not in str(caught.value)


def test_without_data_there_is_no_calibration():
    with pytest.raises(UserError, match=r"^patches received no calibration input: "):
        second_moments(make("vit").model, [])


def test_moments_that_are_not_finite_are_refused():
    moments = torch.eye(4, dtype=torch.float64)[None].clone()
    moments[0, 0, 0] = math.nan
    with pytest.raises(UserError, match="calibration moment"):
        obc(gaussian(2, 4), moments)
