"""Curvature that autograd would get wrong in silence is refused, with the reason; what it gets right is not."""

import warnings

import cases
import pytest
import torch
import torch.nn.functional as F
from spectra import double, normal
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from flatlab.derivatives import operators
from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN, Fisher
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.trace import hessian_trace
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
def test_smooth_parametrizations_are_not_rounded(kind):
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


NORMS = {
    "weight_norm by hooks": lambda layer: nn.utils.weight_norm(layer),
    "weight_norm by hooks, whole": lambda layer: nn.utils.weight_norm(layer, dim=None),
    "weight_norm": parametrizations.weight_norm,
    "weight_norm by columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral_norm by hooks": lambda layer: nn.utils.spectral_norm(layer),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
}


def normed(kind, seed=0, dtype=torch.float64):
    """A network whose first layer is normed."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = nn.Sequential(NORMS[kind](nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()
    case = cases.make("mlp")
    return cases.Case(model, case.inputs.to(dtype), case.targets)


def by_differences(landscape, eps=1e-5):
    """The Hessian by differences of the gradient."""
    eye = torch.eye(landscape.num_params, dtype=torch.float64)
    ends = [[landscape.gradient(landscape.point + sign * eps * e) for sign in (1, -1)] for e in eye]
    return torch.stack([(up - down) / (2 * eps) for up, down in ends], dim=1)


@pytest.mark.parametrize("method", ["reverse", "forward"])
@pytest.mark.parametrize("kind", NORMS)
def test_normed_weights_have_the_curvature_of_their_gradient(kind, method):
    landscape = normed(kind).landscape([20, 4])
    if (kind, method) == ("orthogonal", "forward"):  # torch's derivative of that gradient is wrong
        with pytest.raises(UserError, match="has no Hessian: forward: its product is another one, by"):
            Hessian(landscape, method=method)
        method = "auto"
    if (kind, method) == ("weight_norm by hooks, whole", "forward"):  # torch has no such derivative of a norm of all
        with pytest.raises(UserError, match="has no Hessian: forward: "):
            Hessian(landscape, method=method)
        method = "auto"
    found = Hessian(landscape, method=method) @ torch.eye(landscape.num_params, dtype=torch.float64)
    torch.testing.assert_close(found, by_differences(landscape), rtol=0, atol=1e-8)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(landscape.hvp(landscape.point), found @ landscape.point)


class Squeezed(nn.Module):
    """Squeeze and excitation, as in MobileNetV3; torch has no second derivative of hardsigmoid."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.inplace, self.first, self.second = inplace, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        gate = self.first(x)
        opened = F.hardsigmoid(gate, self.inplace)
        return self.second(gate * opened)  # in place, the gate itself is changed


@pytest.mark.parametrize("method", ["reverse", "forward"])
@pytest.mark.parametrize("inplace", [False, True])
def test_hardsigmoid_has_its_second_derivative(inplace, method):
    model = Squeezed(inplace).double().eval()
    x = 3 * torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    landscape = Landscape(model, [(x, torch.arange(24) % 3)], F.cross_entropy)
    found = Hessian(landscape, method=method) @ torch.eye(landscape.num_params, dtype=torch.float64)
    torch.testing.assert_close(found, by_differences(landscape), rtol=0, atol=1e-7)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12)


def test_the_fused_weight_norm_would_be_wrong(monkeypatch):
    monkeypatch.setattr(operators, "uses_inexact", lambda outputs: False)
    landscape = normed("weight_norm").landscape(check=False)
    found = Hessian(landscape) @ torch.eye(landscape.num_params, dtype=torch.float64)
    assert (found - by_differences(landscape)).abs().max() > 0.01  # once this fails, torch is mended


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal"])
def test_no_draw_of_smooth_weights_looks_rounded(kind):
    for seed in range(24):
        Hessian(normed(kind, seed, torch.float32).landscape(check=False))


@pytest.mark.parametrize("kind", ["weight_norm by hooks", "spectral_norm by hooks"])
def test_derived_weights_stay_where_they_are(kind):
    case = normed(kind)
    landscape, derived = case.landscape(), case.model[0]
    case.model(case.inputs)
    before, bits = derived.weight, derived.weight.detach().clone()

    def same():
        return derived.weight is before and torch.equal(before, bits)

    for ask in (landscape.evaluate, landscape.gradient, landscape.hvp, lambda v: Hessian(landscape) @ v):
        ask(landscape.point + 1.0)
        assert same()
    with pytest.raises(KeyError), landscape.moving() as at:
        at(landscape.point)
        raise KeyError
    assert same()


def test_a_penalty_that_reads_the_parameters_is_differentiated():
    case = double("mlp")
    held = list(case.model.parameters())
    for read in (case.model.parameters, lambda: held):
        for cut in ([24], [5, 19]):
            landscape = cases.Case(
                case.model,
                case.inputs,
                case.targets,
                lambda o, t, read=read: F.cross_entropy(o, t) + 0.3 * sum(p.square().sum() for p in read()),
            ).landscape(cut)
            v = normal("penalty", shape=(landscape.num_params,))
            expected = case.dense_hessian(landscape.point) @ v + 0.6 * v
            torch.testing.assert_close(Hessian(landscape) @ v, expected)
            torch.testing.assert_close(landscape.hvp(v), expected)


def test_a_kept_graph_ends_when_the_model_was_moved():
    case = double("mlp")
    landscape, v = case.landscape(), normal("kept", shape=(53,))
    operator, expected = Hessian(landscape), case.dense_hessian(landscape.point) @ v
    for _ in range(2):
        torch.testing.assert_close(operator @ v, expected)
        landscape.evaluate(2 * landscape.point)


class Sparse(nn.Module):
    """A bag of words with sparse gradients."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6, sparse=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.words(x)).mean(1))


def test_sparse_embeddings_have_gradient_and_curvature():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Sparse().double().eval()
        case = cases.Case(model, torch.randint(0, 11, (24, 5)), torch.arange(24) % 3)
    landscape = case.landscape()
    slope, product = landscape.gradient(), landscape.hvp(landscape.point)
    assert model.words.sparse
    model.words.sparse = False
    torch.testing.assert_close(slope, torch.func.grad(case.functional())(landscape.point))
    torch.testing.assert_close(product, case.dense_hessian(landscape.point) @ landscape.point)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="aot_eager"), nn.DataParallel, torch.jit.script])
def test_wrapped_models_have_the_curvature_of_what_they_wrap(wrap):
    case = double("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = wrap(cases.make("mlp").double().model).eval()
    landscape = cases.Case(wrapped, case.inputs, case.targets).landscape()
    expected = case.dense_hessian(landscape.point)
    for method in ("reverse", "forward"):
        found = Hessian(landscape, method=method) @ torch.eye(53, dtype=torch.float64)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(landscape.hvp(landscape.point), expected @ landscape.point)


def test_replicas_on_several_devices_are_refused():
    case = cases.make("mlp")
    wrapped = nn.DataParallel(case.model).eval()
    landscape = cases.Case(wrapped, case.inputs, case.targets).landscape()
    wrapped.device_ids = [0, 1]
    with pytest.raises(UserError, match=r"is a DataParallel on 2: pass its `.module`"):
        Hessian(landscape)


def test_a_loss_without_second_derivative_is_refused_in_a_sentence():
    def loss(outputs, lengths):
        targets = torch.ones(len(lengths), 3, dtype=torch.long)
        scores = outputs.log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(scores, targets, torch.full_like(lengths, 9), lengths, reduction="none")

    data = [(normal("ctc", shape=(6, 9, 6)), torch.full((6,), 3))]
    landscape = Landscape(nn.Linear(6, 5).double().eval(), data, loss)
    for ask in (landscape.hvp, lambda v: hessian_spectrum(landscape, k=1)):
        with pytest.raises(UserError, match="has no Hessian: reverse: .*ctc_loss"):
            ask(landscape.point)


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
    with pytest.raises(
        UserError, match="has no Hessian: reverse: a function in it is marked with @once_differentiable"
    ):
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
    with pytest.raises(UserError, match="k must be between 1 and the 53 parameters, got 54"):
        hessian_spectrum(landscape, k=54)


def test_a_loss_that_is_not_finite_is_found_without_the_probes_too():
    case = cases.make("mlp")
    landscape = Landscape(case.model, case.batches(), lambda o, t: o.square().sum(1) * torch.inf, check=False)
    with pytest.raises(UserError, match="A product of the Hessian with a vector is not finite"):
        hessian_spectrum(landscape, k=1)
