"""BatchNorm folded inside the graph: the same products, the same model afterwards, and only where it may be."""

import cases
import pytest
import torch
import torch.nn.functional as F
from spectra import dense, double, landscape_of, normal
from torch import nn

from flatlab.derivatives import batchnorm_folding
from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN, Fisher
from flatlab.landscape.landscape import Landscape


class Wired(nn.Module):
    """Convolutions and BatchNorm, wired in a way of one's own."""

    def __init__(self, wire, **norm):
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1, bias=False)
        self.bn, self.last = nn.BatchNorm2d(4, **norm), nn.BatchNorm2d(4)
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x).mean((2, 3))


def wired(wire, **norm):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Wired(wire, **norm).double().eval()
        for bn in (model.bn, model.last):
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)
    x = normal("wired", shape=(12, 2, 5, 5))
    return Landscape(model, [(x[:7], torch.arange(7) % 4), (x[7:], torch.arange(5) % 4)], F.cross_entropy)


WIRES = {
    "2 of 2": lambda m, x: m.last(m.other(m.bn(m.conv(x)).relu())),
    "1 of 2 BatchNorm layers folded; last does not follow": lambda m, x: m.other(m.last(m.bn(m.conv(x)).relu())),
    "1 of 2 BatchNorm layers folded; last shares the output": lambda m, x: _reused(m, x),
    "0 of 2 BatchNorm layers folded; bn is not a plain BatchNorm that is called once": lambda m, x: m.last(
        m.bn(m.bn(m.conv(x))).sin()
    ),
    "0 of 2 BatchNorm layers folded; bn does not follow": lambda m, x: m.last(m.bn(m.conv(x).sin()).sin()),
    "0 of 2 BatchNorm layers folded; bn shares the output": lambda m, x: m.last(
        m.bn(m.other(a := m.other(m.conv(x)).sin())).sin() + a
    ),
}


def _reused(m, x):
    hidden = m.other(m.bn(m.conv(x)).relu())
    return m.last(hidden) + hidden.sin()


@pytest.mark.parametrize("told", WIRES)
@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_only_what_follows_directly_is_folded_and_products_are_the_same(told, method, untouched):
    landscape = wired(WIRES[told])
    vectors = normal("folding", shape=(landscape.num_params, 3))
    with untouched(landscape.model):
        folded = Hessian(landscape, method=method)
        assert folded.folding.startswith(told)
        plain = Hessian(landscape, method=method, fold=False)
        assert plain.folding == "not asked for"
        expected = plain @ vectors
        torch.testing.assert_close(folded @ vectors, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    assert not any("forward" in vars(module) for module in landscape.model.modules())


@pytest.mark.parametrize("make", [Hessian, GGN, Fisher])
@pytest.mark.parametrize("layout", ["one", "uneven", "strata"])
def test_all_operators_fold(make, layout):
    landscape = landscape_of(double("conv_bn"), layout)
    operator, vectors = make(landscape), normal("folding", shape=(landscape.num_params, 2))
    assert operator.folding == "2 of 2 BatchNorm layers folded"
    expected = make(landscape, fold=False) @ vectors
    torch.testing.assert_close(operator @ vectors, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_the_folded_hessian_is_the_dense_one():
    landscape = double("conv_bn").landscape()
    columns = Hessian(landscape) @ torch.eye(landscape.num_params, dtype=torch.float64)
    torch.testing.assert_close(columns, dense("conv_bn", "one"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [{"affine": False}, {"eps": 0.1}, {"momentum": None}])
def test_batchnorm_of_other_settings_folds_alike(norm):
    landscape = wired(lambda m, x: m.last(m.other(m.bn(m.conv(x)).relu())), **norm)
    vector = normal("folding", shape=(landscape.num_params,))
    folded = Hessian(landscape)
    assert folded.folding.startswith("2 of 2")
    torch.testing.assert_close(folded @ vector, Hessian(landscape, fold=False) @ vector, rtol=1e-10, atol=1e-13)


AXES = {
    "linear": (lambda: nn.Linear(3, 4), nn.BatchNorm1d, (6, 3)),
    "one": (lambda: nn.Conv1d(3, 4, 2), nn.BatchNorm1d, (6, 3, 5)),
    "three, grouped": (lambda: nn.Conv3d(2, 4, 2, groups=2, bias=False), nn.BatchNorm3d, (6, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("axes", AXES)
def test_linear_layers_and_convolutions_of_other_axes_fold(axes):
    layer, norm, shape = AXES[axes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(layer(), norm(4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        model(torch.randn(shape))  # statistics of its own, too
    x = normal("axes", axes, shape=shape)
    landscape = Landscape(model.double().eval(), [(x, torch.arange(6) % 3)], F.cross_entropy)
    vector, folded = normal("axes", shape=(landscape.num_params,)), Hessian(landscape)
    assert folded.folding == "1 of 1 BatchNorm layers folded"
    torch.testing.assert_close(folded @ vector, Hessian(landscape, fold=False) @ vector, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("features", [4, 7])
def test_batchnorm_over_the_tokens_of_a_linear_layer_is_left_alone(features):
    """BatchNorm1d normalises axis 1 of (n, 7, features), the layer's outputs lie along axis 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = [nn.Linear(5, features), nn.BatchNorm1d(7), nn.Tanh(), nn.Flatten(), nn.Linear(7 * features, 4)]
        model = nn.Sequential(*tokens, nn.BatchNorm1d(4)).double().eval()
        for norm in (model[1], model[5]):
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
    case = cases.Case(model, normal("tokens", shape=(6, 7, 5)), torch.arange(6) % 4)
    operator = Hessian(case.landscape([6]))
    assert (
        operator.folding == "1 of 2 BatchNorm layers folded; 1 normalises another axis than that of the layer's outputs"
    )
    vector = normal("tokens", shape=(operator.shape[0],))
    expected = torch.func.jvp(torch.func.grad(case.functional()), (operator.landscape.point,), (vector,))[1]
    torch.testing.assert_close(operator @ vector, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(operator.landscape.hvp(vector), expected, rtol=1e-9, atol=1e-12)


def test_what_does_not_vary_is_not_folded():
    operator = Hessian(double("conv_bn").landscape(params="7.*"))
    assert operator.folding == "0 of 2 BatchNorm layers folded; 1 has nothing before it that varies"


def test_a_model_without_batchnorm_says_so():
    assert Hessian(double("mlp").landscape()).folding == "no BatchNorm in the model"


def test_a_layer_with_a_hook_of_the_users_is_left_alone():
    case = cases.make("conv_bn").double()
    case.model[0].register_forward_hook(lambda module, inputs, output: None)
    assert Hessian(case.landscape()).folding.startswith("1 of 2 BatchNorm layers folded; 1 does not follow")


def test_the_model_is_put_back_after_an_exception(untouched):
    model = double("conv_bn").model

    def call():
        raise KeyError

    with untouched(model), pytest.raises(KeyError):
        batchnorm_folding.find_folds(model, call)
    with pytest.raises(KeyError), Hessian(double("conv_bn").landscape())._folds.applied():
        call()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("wrong", ["scale", "shift"])
def test_a_wrong_fold_is_found_out(wrong, monkeypatch):
    true = batchnorm_folding._folded

    def bug(layer, norm):
        forward = true(layer, norm)
        return (lambda x: 1.01 * forward(x)) if wrong == "scale" else (lambda x: forward(x) + 0.1)

    monkeypatch.setattr(batchnorm_folding, "_folded", bug)
    operator = Hessian(double("conv_bn").landscape())
    assert operator.folding == "0 of 2 BatchNorm layers folded: the outputs would differ"
    vector = normal("folding", shape=(operator.shape[0],))
    torch.testing.assert_close(operator @ vector, dense("conv_bn", "one") @ vector, rtol=1e-9, atol=1e-12)
