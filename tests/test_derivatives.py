"""Curvature that autograd would get wrong in silence is refused, with the reason; what it gets right is not."""

import cases
import pytest
import torch
import torch.nn.functional as F
from spectra import double, normal
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from flatlab.curvature.operators import Hessian
from flatlab.curvature.outer import GGN, Fisher
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.lanczos import hessian_spectrum
from flatlab.metrics.trace import hessian_trace
from flatlab.quant.attach import attach, bake

WAYS = [Hessian, GGN, Fisher, hessian_spectrum, hessian_trace, lambda landscape: landscape.hvp(landscape.point)]


def quantized(bits, dtype=torch.float64):
    """A network whose convolutions are quantized and whose step sizes are held still."""
    case = cases.make("conv_bn")
    attach(case.model, bits=bits, outside="7")  # the head
    case.model.to(dtype).eval()
    for name, parameter in case.model.named_parameters():
        if name.endswith("scale"):
            parameter.requires_grad_(False)
    return cases.Case(case.model, case.inputs.to(dtype), case.targets)


@pytest.mark.parametrize("way", WAYS)
def test_curvature_through_lsq_is_refused(way, untouched):
    case = quantized(7)
    with untouched(case.model), pytest.raises(UserError, match=r"'0.weight' is rounded \(LSQ\).* bake\(model\) first"):
        way(case.landscape())


@pytest.mark.parametrize("bits", [2, 3, 8, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_seen_at_any_width(bits, dtype):
    with pytest.raises(UserError, match="is rounded"):
        Hessian(quantized(bits, dtype).landscape())


def test_a_quantized_network_has_curvature_where_it_is_baked_or_held_still():
    case = quantized(7)
    norms = case.landscape(params=["1.*", "4.*"])
    assert (Hessian(norms) @ torch.ones(norms.num_params)).any()
    bake(case.model)
    whole = case.landscape()
    torch.testing.assert_close(Hessian(whole) @ whole.point, case.dense_hessian(whole.point) @ whole.point)


def test_another_straight_through_estimator_is_refused_too():
    class Sign(nn.Module):
        def forward(self, weight):
            return weight + (weight.sign() - weight).detach()

    case = double("mlp")
    model = nn.Sequential(nn.Linear(6, 3))
    parametrize.register_parametrization(model[0], "weight", Sign())
    landscape = cases.Case(model.double().eval(), case.inputs, case.targets).landscape()
    with pytest.raises(UserError, match=r"'0.weight' is rounded \(Sign\)"):
        landscape.hvp(landscape.point)


@pytest.mark.parametrize("kind", ["orthogonal", "masked"])
def test_smooth_parametrizations_are_not(kind):
    class Masked(nn.Module):
        """Most of the weights lie on a grid for good, as INQ's do; the others are themselves."""

        def forward(self, weight):
            free = torch.arange(weight.numel()).reshape(weight.shape) % 4 == 0
            return torch.where(free, weight, weight.detach().round())

    case = double("mlp")
    model = nn.Sequential(nn.Linear(6, 3)).double()
    if kind == "orthogonal":
        parametrizations.orthogonal(model[0], orthogonal_map="cayley")
    else:
        parametrize.register_parametrization(model[0], "weight", Masked())
    landscape = cases.Case(model.eval(), case.inputs, case.targets).landscape()
    v = normal("smooth", shape=(landscape.num_params,))
    torch.testing.assert_close(Hessian(landscape) @ v, landscape.hvp(v))
    eps = 1e-5
    slopes = [landscape.gradient(landscape.point + sign * eps * v) for sign in (1, -1)]
    torch.testing.assert_close(landscape.hvp(v), (slopes[0] - slopes[1]) / (2 * eps), rtol=1e-6, atol=1e-8)


def test_a_second_derivative_that_torch_would_call_zero_is_refused():
    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].cos()

    class Model(nn.Linear):
        def forward(self, x):
            return Sine.apply(super().forward(x))

    x = normal("sine", shape=(8, 3))
    landscape = Landscape(Model(3, 2).double().eval(), [(x, torch.ones(8, 2))], F.mse_loss)
    with pytest.raises(UserError, match="has no Hessian: a function in it is marked with @once_differentiable"):
        landscape.hvp(landscape.point)


# ---------------------------------------------------------------------- bad input, in one sentence for each spectrum


class Noisy(nn.Linear):
    """Draws at random in eval mode too."""

    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


BAD = {
    "has no parameter that requires a gradient": (nn.Flatten(), F.cross_entropy),
    "The loss at the point itself must be finite": (nn.Linear(6, 3), lambda o, t: o.sum(1) * torch.inf),
    "The same batch gives two different outputs or losses": (Noisy(6, 3), F.cross_entropy),
}


@pytest.mark.parametrize("sentence", BAD)
@pytest.mark.parametrize("way", [hessian_spectrum, hessian_trace])
def test_no_spectrum_of_what_has_none(sentence, way):
    model, loss = BAD[sentence]
    case = cases.make("mlp")
    with pytest.raises(UserError, match=sentence):
        way(cases.Case(model.eval(), case.inputs, case.targets, loss).landscape())


def test_more_eigenvalues_than_there_are_parameters():
    landscape = cases.make("mlp").landscape()
    with pytest.raises(UserError, match="k must lie between 1 and the 53 parameters, but is 54"):
        hessian_spectrum(landscape, k=54)


def test_a_loss_that_is_not_finite_is_found_without_the_probes_too():
    case = cases.make("mlp")
    landscape = Landscape(case.model, case.batches(), lambda o, t: o.square().sum(1) * torch.inf, check=False)
    with pytest.raises(UserError, match="A product of the Hessian with a vector is not finite"):
        hessian_spectrum(landscape, k=1)
