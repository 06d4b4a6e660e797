"""Products with curvature against dense autograd, closed forms, SciPy, and bugs that are planted."""

import cases
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from spectra import LAYOUTS, dense, dense_outer, double, landscape_of, normal, softmax_regression
from torch import nn

from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN, Fisher
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape

METHODS = ("reverse", "forward", "auto")


def vectors(landscape, k=3):
    return normal("vectors", k, shape=(landscape.num_params, k)).to(landscape.point.dtype)


def agree(operator, matrix):
    """Assert that an operator is a matrix: in a block, in single vectors, symmetric, and twice the same."""
    block = vectors(operator.landscape)
    expected, scale = matrix @ block, (matrix @ block).abs().max()
    tolerance = {"rtol": 0, "atol": 1e-9 * scale.item()}
    products = operator @ block
    torch.testing.assert_close(products, expected, **tolerance)
    torch.testing.assert_close(operator @ block[:, 0], expected[:, 0], **tolerance)
    assert torch.equal(operator @ block, products)
    assert (block[:, 1] @ (operator @ block[:, 0])).item() == pytest.approx((block[:, 0] @ products[:, 1]).item(), 1e-9)
    assert operator.products == 8


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", cases.MODELS)
def test_the_hessian_agrees_with_dense_autograd_and_leaves_the_model_untouched(name, layout, untouched):
    case = double(name)
    with untouched(case.model):
        landscape = landscape_of(case, layout)
        for method in METHODS:
            agree(Hessian(landscape, method=method), dense(name, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "tied"])
def test_outer_products_agree_with_sums_over_samples(name, layout, untouched):
    case = double(name)
    with untouched(case.model):
        landscape = landscape_of(case, layout)
        for method in METHODS:
            agree(GGN(landscape, method=method), dense_outer(name, layout, "ggn"))
            for kind in ("expected", "empirical"):
                agree(Fisher(landscape, kind=kind, method=method), dense_outer(name, layout, kind))


@pytest.mark.parametrize("make", [Hessian, GGN, Fisher])
def test_softmax_regression_has_a_kronecker_hessian(make):
    landscape, expected = softmax_regression()
    agree(make(landscape), expected)


@pytest.mark.parametrize("name", cases.MODELS)
def test_products_in_float32_are_those_in_float64(name):
    landscape = cases.make(name).landscape([20, 4])
    for method in METHODS:
        operator = Hessian(landscape, method=method)
        products = operator @ vectors(landscape)
        assert (products.dtype, operator.dtype, operator.shape) == (torch.float32,) * 2 + ((landscape.num_params,) * 2,)
        expected = dense(name, "one").float() @ vectors(landscape)
        assert (products - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_takes_a_block_of_the_hessian(method):
    case = double("conv_bn")
    landscape = case.landscape([5, 1, 11, 7], params=["0.*", "7.*"])
    named = {n: p.numel() for n, p in case.model.named_parameters()}
    mask = torch.cat([torch.full((size,), n.startswith(("0.", "7."))) for n, size in named.items()])
    agree(Hessian(landscape, method=method), dense("conv_bn", "one")[mask][:, mask])


@pytest.mark.parametrize("pattern", ["first.weight", "second.weight"])
def test_a_tied_weight_is_found_by_each_of_its_names(pattern):
    agree(Hessian(double("tied").landscape(params=pattern)), dense("tied", "one")[:36, :36])


def test_a_loss_without_curvature_has_products_of_zero():
    x = normal("linear", shape=(6, 3))
    landscape = Landscape(nn.Linear(3, 1).double().eval(), [(x, x)], lambda outputs, targets: outputs[:, 0])
    for make in (Hessian, GGN):
        for method in METHODS:
            assert not (make(landscape, method=method) @ vectors(landscape)).any()


# ------------------------------------------------------------------------------------------- how products are made


def test_the_method_and_its_reason_are_named():
    case = double("mlp")
    assert "kept between" in Hessian(case.landscape()).reason
    measured = Hessian(case.landscape([20, 4]))
    assert "measured on one batch: reverse" in measured.reason
    assert measured.method in ("reverse", "forward")
    assert Hessian(case.landscape(), method="forward").reason == "as asked"


def function(**members):
    """A model x -> sin(x w), through an autograd function of its own."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].cos()

    for name, member in members.items():
        setattr(Sine, name, staticmethod(member))

    class Model(nn.Linear):
        def forward(self, x):
            return Sine.apply(super().forward(x))

    x = normal("sine", shape=(8, 3))
    torch.manual_seed(0)
    model = Model(3, 2).double().eval()
    return Landscape(model, [(x[:6], torch.ones(6, 2)), (x[6:], torch.ones(2, 2))], nn.functional.mse_loss)


def test_a_model_without_forward_mode_falls_back_and_says_so():
    operator = Hessian(function())
    assert (operator.method, operator.reason[:20]) == ("reverse", "forward mode fails: ")
    with pytest.raises(UserError, match=r"cannot be differentiated twice, so it has no Hessian: forward: "):
        Hessian(function(), method="forward")


def test_a_wrong_forward_mode_is_found_out(monkeypatch):
    true = Hessian._forward
    monkeypatch.setattr(Hessian, "_forward", lambda self, term, views: [1.1 * t for t in true(self, term, views)])
    operator = Hessian(double("mlp").landscape([20, 4]))
    assert operator.method == "reverse"
    assert "its product is another one" in operator.reason


def test_a_model_without_second_derivative_is_refused():
    once = torch.autograd.function.once_differentiable(lambda ctx, grad: grad * ctx.saved_tensors[0].cos())
    with pytest.raises(UserError, match=r"cannot be differentiated twice, so it has no Hessian: reverse: .*; forward:"):
        Hessian(function(backward=once))


def test_forward_mode_stands_in_where_there_is_no_second_backward(monkeypatch):
    def absent(self, term):
        raise NotImplementedError("derivative for aten::some_backward is not implemented")

    monkeypatch.setattr(Hessian, "_graph", absent)
    operator = Hessian(double("mlp").landscape())
    assert (operator.method, operator.reason) == (
        "forward",
        "reverse mode fails: derivative for aten::some_backward is not implemented",
    )
    agree(operator, dense("mlp", "one"))


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused():
    landscape = double("mlp").landscape()
    operator = Hessian(landscape)
    for wrong in (torch.ones(3), torch.ones(3, 53), torch.ones(())):
        with pytest.raises(UserError, match=r"vectors of shape \(53,\) or blocks \(53, k\), got"):
            operator @ wrong
    with pytest.raises(UserError, match="Unknown method 'sideways'"):
        Hessian(landscape, method="sideways")
    with pytest.raises(UserError, match="Unknown kind of Fisher matrix 'true'"):
        Fisher(landscape, kind="true")
    with pytest.raises(UserError, match=r"needs logits of shape \(n, C\), got outputs \(2,\)"):
        Fisher(cases.Quadratic(torch.eye(3)).landscape())


def test_a_loss_that_weighs_samples_has_a_ggn_and_no_fisher():
    x, y = normal("weighed", shape=(6, 3)).double(), torch.tensor([0, 1, 1, 0, 1, 0])
    weights = torch.tensor([1.0, 4.0, 0.0, 2.0, 0.5, 1.0])

    def loss(outputs, targets):
        labels, weight = targets[:, 0].long(), targets[:, 1]
        return nn.functional.cross_entropy(outputs, labels, reduction="none") * weight, weight

    landscape = Landscape(nn.Linear(3, 2).double().eval(), [(x, torch.stack([y, weights], dim=1))], loss)
    agree(GGN(landscape), Hessian(landscape) @ torch.eye(landscape.num_params).double())  # equal for a linear network
    for kind in ("expected", "empirical"):
        with pytest.raises(UserError, match=r"the loss returns a pair \(sums, weights\): use GGN"):
            Fisher(landscape, kind=kind)


class Nest(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return {"y": y, "z": (torch.tanh(y), None)}


def test_the_ggn_of_a_nest_of_outputs_is_by_the_tensors_that_the_loss_reads():
    x = normal("nest", shape=(4, 2))
    one = Landscape(Nest(2, 1).double().eval(), [(x, x)], lambda o, t: o["y"].square().mean())
    eye = torch.eye(3).double()
    agree(GGN(one), Hessian(one) @ eye)  # equal for a linear network
    both = Landscape(one.model, [(x, x)], lambda o, t: (o["y"] + o["z"][0]).square().mean())
    assert (GGN(both) @ eye - GGN(one) @ eye).norm() > 0.1
    assert (Fisher(one, kind="empirical") @ eye).any()
    with pytest.raises(UserError, match="reads one tensor of the outputs, got one that reads 2: use GGN"):
        Fisher(both, kind="empirical")


def test_a_product_that_is_not_finite_is_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return x + (self.w.square() ** 0.75).sum()  # its second derivative at zero is infinite

    landscape = Landscape(Root().eval(), [(torch.zeros(2), torch.zeros(2))], lambda o, t: o)
    with pytest.raises(UserError, match="A product of the Hessian with a vector is not finite"):
        Hessian(landscape) @ torch.ones(2)


def test_a_model_that_was_changed_since_is_refused():
    case = cases.make("mlp")
    operator = Hessian(case.landscape())
    with torch.no_grad():
        case.model[0].weight.mul_(2.0)
    with pytest.raises(UserError, match="trained since"):
        operator @ torch.ones(53)


# ------------------------------------------------------------------------------------------- planted bugs, SciPy


def unweighted(monkeypatch):
    true = Landscape.terms

    def alike(x, total, count, batches):
        return x, lambda outputs: total(outputs) / len(x) / batches, 1

    monkeypatch.setattr(Landscape, "terms", lambda self: [alike(*term, len(true(self))) for term in true(self)])


def swapped(monkeypatch):
    true = Hessian._graph
    monkeypatch.setattr(Hessian, "_graph", lambda self, term: lambda v: [-g for g in true(self, term)(v)])


def stale(monkeypatch):
    true = Hessian._apply
    kept = []

    def apply(self, term, width):
        kept.append(true(self, term, width))
        return kept[0]

    monkeypatch.setattr(Hessian, "_apply", apply)


@pytest.mark.parametrize("bug", [unweighted, swapped, stale])
def test_planted_bugs_are_caught(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        agree(Hessian(double("mlp").landscape([5, 1, 11, 7]), method="reverse"), dense("mlp", "one"))


def test_scipy_finds_the_same_eigenvalues():
    landscape = double("tied").landscape([5, 1, 11, 7])
    operator = Hessian(landscape).to_scipy()
    start = normal("arpack", shape=(landscape.num_params,)).numpy()
    found = scipy.sparse.linalg.eigsh(operator, k=4, which="LA", v0=start, return_eigenvectors=False)
    assert np.sort(found) == pytest.approx(torch.linalg.eigvalsh(dense("tied", "one"))[-4:].numpy(), rel=1e-8)
    assert operator.dtype == np.float64
    assert operator.matmat(np.eye(69)[:, :2]) == pytest.approx(dense("tied", "one")[:, :2].numpy(), abs=1e-10)


@pytest.mark.parametrize("kind", [Hessian, GGN, Fisher])
def test_what_is_no_landscape_is_refused(kind):
    with pytest.raises(
        UserError, match=rf"^{kind.__name__}: landscape must be a Landscape, got Linear: build Landscape"
    ):
        kind(torch.nn.Linear(2, 2))
