"""The landscape's promises, probed on the function itself: what real networks and losses break, and what not."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlab.derivatives.operators import Hessian
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.trace import hessian_trace
from flatlab.metrics.flatness.sphere import sphere_flatness


def numbers(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X, Y = numbers(24, 6), torch.arange(24) % 3


def mlp(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), activation(), nn.Linear(5, 3)).double().eval()


# ----------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]))])
def test_batches_of_one_sample_hide_no_weights(loss):
    loss = loss.double()
    with pytest.raises(UserError, match="samples of several batches is .* but over its samples it differs by"):
        Landscape(mlp(), list(zip(X.split(1), Y.split(1), strict=True)), loss)


def test_a_loss_that_some_samples_alone_do_not_have_is_refused_without_a_number():
    targets = torch.where(torch.arange(24) % 4 == 0, Y, -100)
    with pytest.raises(
        UserError, match="but of some samples alone it is not finite, so it is not .*; it weighs"
    ) as told:
        Landscape(mlp(), [(X, targets)], lambda outputs, targets: F.cross_entropy(outputs, targets))
    assert "nan" not in str(told.value)


def test_batches_of_one_class_hide_no_class_weights():
    sort = Y.argsort()
    data = list(zip(X[sort].split(8), Y[sort].split(8), strict=True))
    with pytest.raises(UserError, match="weighs samples unequally"):
        Landscape(mlp(), data, nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]).double()))


def test_batches_of_one_sample_hide_no_statistics_of_the_batch():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(UserError, match="samples mix in the model"):
        Landscape(Centred(6, 3).double().eval(), list(zip(X.split(1), Y.split(1), strict=True)), F.cross_entropy)


@pytest.mark.parametrize("strata", [False, True])
def test_a_buffer_that_is_refilled_is_copied(strata):
    class Loader:
        buffer = torch.zeros(12, dtype=torch.int64)

        def __init__(self, start, stop):
            self.rows = range(start, stop, 12)

        def __iter__(self):
            for start in self.rows:
                self.buffer.copy_(Y[start : start + 12])
                yield X[start : start + 12], self.buffer

    data = {"a": Loader(0, 12), "b": Loader(12, 24)} if strata else Loader(0, 24)
    found = Landscape(mlp(), data, F.cross_entropy).evaluate().loss
    assert found == pytest.approx(F.cross_entropy(mlp()(X), Y).item(), rel=1e-12)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.h = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, tokens):
        return self.h(self.e(tokens)).transpose(1, 2)


def token_sums(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none").sum(1), (targets != -100).sum(1)


@pytest.mark.parametrize("cut", [[8], [3, 1, 4]])
def test_the_mean_over_tokens_is_given_by_sums_and_weights(cut):
    tokens = torch.randint(0, 20, (8, 6), generator=torch.Generator().manual_seed(0))
    targets = tokens.clone()
    for row in range(8):
        targets[row, 2 + row % 4 :] = -100
    model = Tokens().double().eval()
    whole = cases.Case(model, tokens, targets)  # the dense token mean
    data = list(zip(tokens.split(cut), targets.split(cut), strict=True))
    landscape, loss = Landscape(model, data, token_sums), whole.functional()
    point, v = landscape.point, numbers(landscape.num_params)
    assert landscape.evaluate().loss == pytest.approx(float(loss(point)), rel=1e-12)
    torch.testing.assert_close(landscape.gradient(), torch.func.grad(loss)(point))
    (expected,) = torch.func.vjp(torch.func.grad(loss), point)[1](v)
    torch.testing.assert_close(landscape.hvp(v), expected)
    with landscape.moving() as at:
        rise = at(v, 0.1)[0]
        blocks = [landscape.gather(block) for block in landscape.blocks(3)]
        shares = np.mean([at(v, 0.1, block=block)[0] for block in blocks])
    assert rise == pytest.approx(float(loss(point + 0.1 * v)), rel=1e-12) == shares
    with pytest.raises(UserError, match=r"weighs samples unequally .* two vectors, .* \(targets != -100\).sum\(1\)"):
        Landscape(model, data, F.cross_entropy)


def test_class_weights_are_given_the_same_way():
    weights = torch.tensor([1.0, 2, 5]).double()
    model = mlp()
    landscape = Landscape(model, [(X, Y)], lambda o, t: (F.cross_entropy(o, t, weights, reduction="none"), weights[t]))
    assert landscape.evaluate().loss == pytest.approx(F.cross_entropy(model(X), Y, weights).item(), rel=1e-12)
    assert landscape.evaluate().accuracy == (model(X).argmax(1) == Y).double().mean().item()


def test_opening_costs_four_passes_at_most():
    seen, model = [], nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    unused = nn.Linear(3, 3).double().eval()
    model.register_module("unused", unused)
    model.forward = lambda x: seen.append(len(x) * (3 if torch.is_grad_enabled() else 1)) or model[:3](x)
    x, y = numbers(1000, 6), torch.arange(1000) % 3
    landscape = Landscape(model, list(zip(x.split(100), y.split(100), strict=True)), F.cross_entropy)
    assert 3 * 1000 < sum(seen) <= 4 * 1000
    assert "12 of the 65 parameters (18.5%) do not change the loss (unused.weight, unused.bias)" in landscape.remarks[0]
    before = sum(seen)
    landscape.base_loss, landscape.terms(), Landscape(model, [(x, y)], F.cross_entropy, check=False)
    assert sum(seen) == before


# ------------------------------------------------------------------------------------------------------ derivatives


class Blocks(nn.Module):
    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.a, self.b = way, nn.Linear(6, 5), nn.Linear(5, 3)

    def block(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        if self.way == "reentrant":
            return self.b(checkpoint(self.block, x, use_reentrant=True))
        if self.way == "again":
            return self.b(checkpoint(self.block, x, use_reentrant=False))
        if self.way == "kept":
            return self.b(self.block(x))
        return self.b({"detached": self.block(x).detach(), "doubled": Doubled.apply(self.block(x))}[self.way])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_computed_again_in_the_backward_pass(dtype, untouched):
    """They are computed with the model's own weights: right in float32, else refused in a sentence that says so."""
    kept, again = (Blocks(way).to(dtype).eval() for way in ("kept", "again"))
    ones = torch.ones(sum(each.numel() for each in kept.parameters()))
    one, other = (Landscape(model, [(X.to(dtype), Y)], F.cross_entropy) for model in (kept, again))
    if dtype == torch.float32:
        assert torch.allclose(one.hvp(ones), other.hvp(ones), rtol=1e-5, atol=1e-7)
        return
    one.hvp(ones)
    with untouched(again), pytest.raises(UserError, match=r"computed again in the backward pass .*checkpointing off"):
        other.hvp(ones)
    assert torch.equal(one.gradient(), other.gradient())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


@pytest.mark.parametrize("way", ["reentrant", "detached", "doubled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_not_the_slope_is_refused(way, dtype, untouched, recwarn):
    model = Blocks(way).to(dtype).eval()
    with untouched(model), pytest.raises(UserError, match=r"not the slope of the loss: .*'a\.\w+' .* by autograd"):
        Landscape(model, [(X.to(dtype), Y)], F.cross_entropy)
    assert Landscape(model, [(X.to(dtype), Y)], F.cross_entropy, check=False).evaluate().loss > 0


class Rounded(nn.Linear):
    def forward(self, x):
        r = (self.weight / 0.2).clamp(-4, 3)
        return F.linear(x, ((r.round() - r).detach() + r) * 0.2, self.bias)


@pytest.mark.parametrize("params", [None, "0.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_by_detach_has_values_but_no_curvature(params, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Rounded(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype).eval()
    landscape = Landscape(model, [(X.to(dtype), Y)], F.cross_entropy, params=params)
    assert landscape.evaluate().loss == pytest.approx(F.cross_entropy(model(X.to(dtype)), Y).item(), rel=1e-6)
    for way in (Hessian, hessian_trace, lambda each: each.hvp(each.point)):
        with pytest.raises(UserError, match=r"it is rounded in the forward pass \(a straight-through estimator\)"):
            way(landscape)


class Cube(torch.autograd.Function):
    """Its gradient is right, and its backward pass cuts the second derivative off: symmetric, and wrong."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0].detach() ** 2


class Crooked(Cube):
    """A second derivative that is not even symmetric."""

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0]
        return grad * (3 * x.detach() ** 2 + (x.roll(1, 1) - x.roll(1, 1).detach()))


@pytest.mark.parametrize(("function", "sentence"), [(Cube, "the derivative of the gradient"), (Crooked, "symmetric")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrong_second_derivatives_are_refused_once_asked_for(function, sentence, dtype):
    class Net(nn.Linear):
        def forward(self, x):
            return function.apply(super().forward(x))

    torch.manual_seed(0)
    landscape = Landscape(Net(6, 3).to(dtype).eval(), [(X.to(dtype), Y)], F.cross_entropy)
    with pytest.raises(UserError, match=f"Autograd's Hessian .*not {sentence}"):
        Hessian(landscape)


def test_values_and_derivatives_of_a_transformer_are_of_one_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
            self.enc, self.h = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, pair):
            return self.h(self.enc(pair[0], src_key_padding_mask=pair[1]).mean(1))

    length = 2 + torch.arange(24) % 6
    pair = numbers(24, 7, 8), torch.arange(7)[None] >= length[:, None]
    model = Net().double().eval()
    before = torch.backends.mha.get_fastpath_enabled()
    landscape = Landscape(model, [(pair, Y)], F.cross_entropy)
    assert landscape.base_loss[0] == pytest.approx(F.cross_entropy(model(pair), Y).item(), rel=1e-12)
    gradient, step = landscape.gradient(), 1e-5
    ends = [landscape.evaluate(landscape.point + sign * step * gradient).loss for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(gradient @ gradient), rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_penalty_on_the_models_parameters_is_in_every_derivative():
    model = mlp()

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + 0.3 * sum((p**2).sum() for p in model.parameters())

    landscape, plain = Landscape(model, [(X, Y)], loss), Landscape(model, [(X, Y)], F.cross_entropy)
    v = numbers(landscape.num_params)
    torch.testing.assert_close(landscape.gradient(), plain.gradient() + 0.6 * plain.point)
    torch.testing.assert_close(landscape.hvp(v), plain.hvp(v) + 0.6 * v)
    torch.testing.assert_close(Hessian(landscape) @ v, plain.hvp(v) + 0.6 * v)
    rises = [sphere_flatness(each, [0.5], num_samples=3).value[0] for each in (landscape, plain)]
    assert rises[0] > rises[1]


@pytest.mark.parametrize("graph", [True, False])
def test_a_forward_pass_may_differentiate(graph):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, t):
            with torch.set_grad_enabled(graph or torch.is_grad_enabled()):
                t = t.detach().clone().requires_grad_()
                u = self.net(t)
                (du,) = torch.autograd.grad(u.sum(), t, create_graph=True)
            return torch.cat([u, du], 1)

    model, t = Net().double().eval(), torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    landscape = Landscape(model, [(t, torch.zeros(20))], lambda o, _: (o[:, 1] + o[:, 0]) ** 2)
    outputs = model(t)
    assert landscape.evaluate().loss == pytest.approx(((outputs[:, 1] + outputs[:, 0]) ** 2).mean().item(), rel=1e-12)
    v, step = numbers(landscape.num_params), 1e-6
    ends = [landscape.gradient(landscape.point + sign * step * v) for sign in (1, -1)]
    torch.testing.assert_close(landscape.hvp(v), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


def test_parameters_that_do_not_move_the_loss_are_said():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.aux = nn.Linear(6, 3), nn.Linear(60, 30)

        def forward(self, x):
            return self.l(x)

    model = Aux().double().eval()
    flatness = sphere_flatness(Landscape(model, [(X, Y)], F.cross_entropy), [1.0], num_samples=2)
    assert flatness.remarks[0].startswith("1,830 of the 1,851 parameters (98.9%) do not change the loss (aux.weight,")
    alone = Landscape(model, [(X, Y)], F.cross_entropy, params="aux.*")
    assert not alone.gradient().any()
    with pytest.raises(UserError, match="does not depend on the parameters that vary .*no curvature"):
        Hessian(alone)
    assert not Landscape(model, [(X, Y)], F.cross_entropy, params="l.*").remarks


def test_a_loss_without_gradient_is_not_said_to_depend_on_nothing():
    landscape = Landscape(nn.Linear(6, 3).double().eval(), [(X, Y)], lambda o, t: (o.argmax(1) != t).double())
    with pytest.raises(UserError, match="depends on the parameters that vary .*no gradient by them.* cross_entropy"):
        Hessian(landscape)


# ------------------------------------------------------------------------- one sentence each, and nothing is changed


def embedding(**kwargs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.h = nn.Embedding(10, 4, **kwargs), nn.Linear(4, 3)

        def forward(self, i):
            return self.h(self.e(i).mean(1))

    torch.manual_seed(0)
    return Net().double().eval()


WORDS = torch.arange(72).reshape(24, 3) % 10


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


class Named(nn.Linear):
    def forward(self, a, b):
        return super().forward(a + b)


class Scored(nn.Linear):
    def forward(self, x):
        return {"logits": super().forward(x)}


class Complex(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.w = nn.Parameter(torch.ones(6, dtype=torch.cdouble))

    def forward(self, x):
        return super().forward((x * self.w).real)


@pytest.mark.parametrize(
    ("model", "data", "loss", "sentence"),
    [
        (lambda: embedding(max_norm=0.1), [(WORDS, Y)], F.cross_entropy, "'e' has max_norm=0.1.*set max_norm to None"),
        (lambda: Squeezed(6, 1), [(X[:3], X[:3, 0])], F.mse_loss, r"got shapes \[\(\)\].*squeeze\(1\)"),
        (lambda: nn.LazyLinear(3), [(X, Y)], F.cross_entropy, "'weight' has no shape yet: run one batch"),
        (lambda: Complex(6, 3), [(X, Y)], F.cross_entropy, "must be real, but 'w' is complex.*view_as_real"),
        (
            lambda: Named(6, 3),
            [({"a": X, "c": X}, Y)],
            F.cross_entropy,
            "a dict, and fails .*keys are arguments of its",
        ),
        (lambda: nn.Linear(6, 3), [[X, Y, Y]], F.cross_entropy, r"got 3 items.*for inputs, targets, _ in loader\]"),
        (
            lambda: nn.Linear(6, 3),
            [{"x": X, "labels": Y}],
            F.cross_entropy,
            "keys are arguments of its forward .got other keys or lacks some: x, labels",
        ),
        (
            lambda: nn.Linear(6, 3),
            [{"x": X}],
            F.cross_entropy,
            r"a dict with 'x', but without 'labels': add the targets as batch\[\"labels\"\], or pass pairs",
        ),
        (lambda: nn.Linear(6, 3), [{"x": X, "labels": [0] * 24}], F.cross_entropy, "whose 'labels' are a list: make"),
        (
            lambda: nn.Linear(6, 3),
            [(X.float(), Y)],
            F.cross_entropy,
            r"fails on a batch of \d samples .*: its forward must take the inputs, which are torch.float32 \(\d, 6\),"
            r" and its first parameter is torch.float64 \(3, 6\); convert",
        ),
        (
            lambda: nn.Linear(5, 3),
            [(X, Y)],
            F.cross_entropy,
            r"must take the inputs, which are torch.float64 \(\d, 6\), .*; any number of samples of this shape must do",
        ),
        (
            lambda: nn.Linear(6, 3),
            [(X, Y.double())],
            F.cross_entropy,
            r"The loss fails on a batch of .* targets that are torch.float64 \(\d,\); convert the targets",
        ),
        (
            lambda: Scored(6, 3),
            [(X, Y)],
            F.cross_entropy,
            r"outputs that are a dict of torch.float64 \(\d, 3\) and .*cross_entropy\(outputs.logits, targets\)",
        ),
        (lambda: nn.Linear(6, 3), [(X, Y)], "cross_entropy", r"must be a function of .*, got 'cross_entropy'\."),
        (lambda: nn.Linear(6, 3), [(X, Y)], None, r"must be a function of \(outputs, targets\), .*, got None\."),
        (lambda: nn.Linear(6, 3), [(X, Y)], nn.CrossEntropyLoss, "got the class CrossEntropyLoss: create an instance"),
        (
            lambda: nn.Linear(6, 1),
            [(X, X[:, 0])],
            lambda o, t: (o - t).square().mean(),
            r"\(24, 1\) and targets \(24,\) are broadcast",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(model, data, loss, sentence):
    model = model()
    model = model if isinstance(model, nn.LazyLinear) else model.double()
    before = [p.detach().clone() for p in model.parameters() if not isinstance(model, nn.LazyLinear)]
    with pytest.raises(UserError, match=sentence):
        Landscape(model.eval(), data, loss)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=False))


def test_lengths_that_depend_on_the_batch_are_refused_where_the_loss_sees_them():
    class Tag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.r, self.h = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, pair):
            packed = nn.utils.rnn.pack_padded_sequence(*pair, batch_first=True, enforce_sorted=False)
            return self.h(nn.utils.rnn.pad_packed_sequence(self.r(packed)[0], batch_first=True)[0])

    length = 2 + torch.arange(24) % 3
    length[0] = 7
    data = [((numbers(24, 7, 4), length), torch.arange(168).reshape(24, 7) % 3)]

    def losses(outputs, targets):
        return F.cross_entropy(outputs.transpose(1, 2), targets[:, : outputs.shape[1]], reduction="none")

    with pytest.raises(UserError, match=r"shapes \[\(24, 7, 3\)\].*total_length"):
        Landscape(Tag().double().eval(), data, lambda o, t: losses(o, t).mean(1))


def test_buffers_that_a_forward_pass_wrote_to_are_put_back(untouched):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return super().forward(x)

    model = Counting().double().eval()
    with untouched(model), pytest.raises(UserError, match="forward pass changes 'count'"):
        Landscape(model, [(X, Y)], F.cross_entropy)


def test_sparse_gradients_are_gradients():
    sparse, dense = (Landscape(embedding(sparse=each), [(WORDS, Y)], F.cross_entropy) for each in (True, False))
    torch.testing.assert_close(sparse.gradient(), dense.gradient())


def test_weights_that_are_all_zero_have_radii():
    model = nn.Linear(6, 3).double().eval()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    landscape = Landscape(model, [(X, Y)], F.cross_entropy)
    flatness = sphere_flatness(landscape, "auto", num_samples=100)
    assert flatness.value[0] == pytest.approx(0.01, rel=0.5) and flatness.value[-1] == pytest.approx(2.0, rel=0.5)
    assert np.isinf(flatness.relative_radii).all()


# ------------------------------------------------------------------------------------------- what is right is opened


def relu(dtype):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)


def pooled(dtype):
    layers = [nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 3)).to(dtype)


@pytest.mark.parametrize("make", [relu, pooled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["fresh", "zero biases", "zero", "minimum", "saturated"])
def test_networks_with_kinks_are_not_refused(make, dtype, kind):
    for seed in range(3):
        torch.manual_seed(seed)
        model, loss, targets = make(dtype).eval(), F.cross_entropy, Y
        x = X.to(dtype).clone()
        x[:, :3] = 0.0  # a black border: with zero biases the units behind it lie in their kink
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(0.0 if kind == "zero" or (kind == "zero biases" and "bias" in name) else 1.0)
                p.mul_(10.0 if kind == "saturated" else 1.0)
            if kind == "minimum":
                loss, targets = F.mse_loss, model(x)
        landscape = Landscape(model, [(x, targets)], loss)
        landscape.check_curvature()
