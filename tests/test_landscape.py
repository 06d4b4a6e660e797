"""The landscape against dense autograd, against itself cut otherwise, and against those who would make it lie."""

import copy
from itertools import accumulate

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from flatlab import seeds
from flatlab.derivatives.operators import Hessian
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.quant.attach import attach, bake, scales
from flatlab.tensors import flat

EVERY = [(name, cut) for name in cases.MODELS for cut in cases.CUTS]


def rng(*names):
    return seeds.generator("test_landscape", *names)


def direction(landscape, *names):
    return torch.randn(landscape.num_params, generator=rng(*names)).to(landscape.point)


@pytest.mark.parametrize(("name", "cut"), EVERY)
def test_values_agree_with_the_bare_model_and_leave_it_untouched(name, cut, untouched):
    case = cases.make(name)
    with torch.no_grad():
        outputs = case.model(case.inputs)
    with untouched(case.model):
        landscape = case.landscape(cases.CUTS[cut])
        here = landscape.evaluate()
        v = direction(landscape, name)
        with landscape.moving() as at:
            moved = at(v, 0.1)
        there = landscape.evaluate(landscape.point + 0.1 * v)
        landscape.gradient(), landscape.hvp(v)
    assert here.loss == pytest.approx(case.loss(outputs, case.targets).item(), rel=1e-6)
    assert here.accuracy == (outputs.argmax(1) == case.targets).double().mean().item()
    assert moved == pytest.approx(there.losses, rel=1e-6)
    assert moved != pytest.approx(here.losses, rel=1e-3)


@pytest.mark.parametrize(("name", "cut"), EVERY)
def test_gradient_and_hvp_agree_with_dense_autograd(name, cut):
    case = cases.make(name).double()
    landscape, loss = case.landscape(cases.CUTS[cut]), case.functional()
    point, v = landscape.point, direction(landscape, name)
    torch.testing.assert_close(landscape.gradient(), torch.func.grad(loss)(point), rtol=1e-9, atol=1e-12)
    there = point + 0.1 * v
    torch.testing.assert_close(landscape.gradient(there), torch.func.grad(loss)(there), rtol=1e-9, atol=1e-12)
    with sdpa_kernel(SDPBackend.MATH):
        (expected,) = torch.func.vjp(torch.func.grad(loss), point)[1](v)
    torch.testing.assert_close(landscape.hvp(v), expected, rtol=1e-8, atol=1e-11)


def test_hvp_is_the_dense_hessian_of_an_mlp():
    case = cases.make("mlp").double()
    landscape = case.landscape([5, 1, 11, 7])
    dense = case.dense_hessian(landscape.point)
    columns = torch.stack([landscape.hvp(e) for e in torch.eye(landscape.num_params, dtype=torch.float64)])
    torch.testing.assert_close(columns, dense, rtol=1e-9, atol=1e-12)


def test_hvp_is_the_product_of_the_operator_and_costs_the_same():
    case, passes = cases.make("conv_bn").double(), []
    case.model.register_forward_pre_hook(lambda *_: passes.append(1))
    for cut in ([24], [20, 4]):
        landscape = case.landscape(cut)
        operator, v = Hessian(landscape, method="reverse"), direction(landscape, "hvp")
        torch.testing.assert_close(landscape.hvp(v), operator @ v, rtol=1e-12, atol=1e-14)
        counts = []
        for product in (landscape.hvp, operator.__matmul__):
            passes.clear()
            product(v)
            counts.append(len(passes))
        assert counts == [0, 0] if len(cut) == 1 else counts == [2, 2]
    part = landscape.on(landscape.blocks(8)[0])
    assert not torch.equal(part.hvp(v), landscape.hvp(v))


@pytest.mark.parametrize(("samples", "least", "most"), [(8_000, 2.0, 2.4), (40_000, 1.25, 1.4), (200_000, 1.1, 1.15)])
def test_opening_evaluates_fewer_of_many_samples_a_second_time(samples, least, most):
    model, forwarded = nn.Linear(2, 3).eval(), []
    model.register_forward_pre_hook(lambda _, given: forwarded.append(len(given[0])))
    x = torch.randn(samples, 2, generator=rng("many"))
    cut = [(each, each.argmax(1)) for each in x.split(200)]
    landscape = Landscape(model, cut, F.cross_entropy)
    assert least <= sum(forwarded) / samples <= most
    torch.testing.assert_close(landscape.base_loss[0], F.cross_entropy(model(x), x.argmax(1)).item(), rtol=1e-5, atol=0)


class MixingLong(nn.Module):
    """Mixes the samples of batches that are longer than 7."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 2)

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        return self.head(mean - mean.mean() if x.shape[1] > 7 else mean)


def test_of_many_samples_a_batch_of_each_shape_is_evaluated_a_second_time():
    x = torch.randn(40_000, 3, generator=rng("shapes"))
    batches = [(each, torch.zeros(len(each), dtype=torch.long)) for each in x.split(100)]
    batches.insert(203, (torch.randn(4, 9, generator=rng("long")), torch.zeros(4, dtype=torch.long)))
    with pytest.raises(UserError, match="samples mix in the model"):
        Landscape(MixingLong().eval(), batches, F.cross_entropy)


def test_hvp_of_a_loss_without_curvature_is_zero():
    x = torch.randn(6, 3, generator=rng("linear"))
    landscape = Landscape(nn.Linear(3, 1).eval(), [(x, x)], lambda outputs, targets: outputs[:, 0])
    assert torch.equal(landscape.hvp(torch.ones(4)), torch.zeros(4))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(edges=st.sets(st.integers(1, 23), max_size=8), batch_size=st.none() | st.integers(1, 30))
def test_the_loss_does_not_depend_on_the_cuts(edges, batch_size):
    case = cases.make("conv_bn")
    whole = case.landscape(check=False)
    points = [0, *sorted(edges), 24]
    cut = case.landscape(list(np.diff(points)), batch_size=batch_size, check=False)
    v = direction(whole, "cuts")
    for radius in (0.0, 0.1, 1.0):
        with whole.moving() as at:
            expected = at(v, radius)
        with cut.moving() as at:
            assert at(v, radius) == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(cut.gradient(), whole.gradient(), rtol=1e-4, atol=1e-6)


def test_strata_weigh_equally_whatever_their_sizes():
    case = cases.make("mlp").double()
    batches = case.batches([3, 21])
    landscape = Landscape(case.model, {"few": batches[:1], "many": batches[1:]}, case.loss, batch_size=4)
    few, many = (F.cross_entropy(case.model(x), y).item() for x, y in batches)
    here = landscape.evaluate()
    assert here.losses == pytest.approx([few, many], rel=1e-12)
    assert here.loss == pytest.approx((few + many) / 2, rel=1e-12)
    mean = sum(F.cross_entropy(case.model(x), y) for x, y in batches) / 2
    grads = torch.autograd.grad(mean, list(case.model.parameters()))
    torch.testing.assert_close(landscape.gradient(), flat.flatten(grads))


def test_per_sample_losses_give_the_same_value():
    case = cases.make("mlp")
    vector = Landscape(case.model, case.batches([20, 4]), nn.CrossEntropyLoss(reduction="none"))
    assert vector.evaluate().loss == pytest.approx(case.landscape().evaluate().loss, rel=1e-6)


def test_nests_of_inputs_are_recut():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(3, 1)

        def forward(self, nest):
            return {"y": self.a(nest["a"]) + self.b(nest["more"][0])}

    def loss(outputs, targets):
        return F.mse_loss(outputs["y"], targets)

    x, z, y = (torch.randn(7, n, generator=rng("nest", n)) for n in (2, 3, 1))
    model = Two().eval()
    values = [
        Landscape(model, [({"a": x, "more": (z, None)}, y)], loss, batch_size=size).evaluate().loss
        for size in (None, 1, 3)
    ]
    assert values == pytest.approx([loss(model({"a": x, "more": (z,)}), y).item()] * 3, rel=1e-6)


def test_the_flat_vector_is_in_logical_order_whatever_the_strides():
    case = cases.make("conv_bn")
    last = copy.deepcopy(case.model).to(memory_format=torch.channels_last)
    twin = Landscape(last, case.batches(), case.loss)
    landscape = case.landscape()
    assert torch.equal(twin.point, landscape.point)
    v = direction(twin, "order")
    with twin.moving() as at, landscape.moving() as plain:
        assert at(v, 0.1) == pytest.approx(plain(v, 0.1), rel=1e-5)


def test_a_transposed_weight_keeps_its_strides(untouched):
    case = cases.make("mlp")
    expected = case.landscape().gradient()
    case.model[0].weight.data = case.model[0].weight.data.T.contiguous().T
    with untouched(case.model):
        landscape = case.landscape()
        torch.testing.assert_close(landscape.gradient(), expected)
        with landscape.moving() as at:
            at(direction(landscape, "transposed"), 1.0)


def test_tied_weights_count_once():
    case = cases.make("tied")
    landscape = case.landscape()
    assert landscape.num_params == 36 + 6 + 6 + 18 + 3
    assert list(flat.select(case.model, "second.weight")) == ["second.weight"]
    assert len(flat.select(case.model, ["first.*", "second.*"])) == 3


def test_a_pattern_holds_the_rest_still(untouched):
    case = cases.make("conv_bn")
    landscape = case.landscape(params="7.*")
    with untouched(case.model), landscape.moving() as at:
        at(direction(landscape, "pattern"), 1.0)
        assert torch.equal(case.model[0].weight, cases.make("conv_bn").model[0].weight)
    assert landscape.num_params == 54 * 3 + 3
    assert landscape.norm == pytest.approx(landscape.point.norm().item(), rel=1e-6)


@pytest.mark.parametrize("moment", ["moving", "evaluate", "gradient", "hvp"])
def test_an_exception_in_the_middle_restores_the_model(moment, untouched):
    case, calls = cases.make("conv_bn_channels_last"), []

    def loss(outputs, targets):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return F.cross_entropy(outputs, targets)

    landscape = Landscape(case.model, case.batches(cases.CUTS["uneven"]), loss, check=False)
    v = direction(landscape, "exception")
    with untouched(case.model), pytest.raises(KeyboardInterrupt):
        if moment == "moving":
            with landscape.moving() as at:
                at(v, 3.0)
        else:
            getattr(landscape, moment)(v)


def test_reading_the_data_moves_no_global_draw():
    case = cases.make("mlp")
    before = torch.get_rng_state()
    Landscape(case.model, DataLoader(TensorDataset(case.inputs, case.targets), 5), case.loss)
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_that_refills_one_buffer_is_read_rightly():
    case = cases.make("mlp")

    class Refilling:
        def __iter__(self):
            buffer, labels = torch.empty(8, 6), torch.empty(8, dtype=torch.int64)
            for x, y in zip(case.inputs.split(8), case.targets.split(8), strict=True):
                buffer.copy_(x), labels.copy_(y)
                yield buffer, labels

    assert Landscape(case.model, Refilling(), case.loss).base_loss == pytest.approx(
        case.landscape().base_loss, rel=1e-6
    )


def test_infinite_losses_are_shown_as_such():
    x = torch.ones(2, 1)
    model = nn.Linear(1, 1, bias=False).eval()
    landscape = Landscape(model, [(x, x)], lambda outputs, targets: outputs[:, 0].exp())
    with landscape.moving() as at:
        assert at(torch.ones(1), 1e4).tolist() == [np.inf]
    assert landscape.evaluate(torch.tensor([np.nan])).losses.tolist() == pytest.approx([np.nan], nan_ok=True)


# ---------------------------------------------------------------------------------------- what must be refused


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn(x.shape))


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.b.weight.data = self.a.weight.data

    def forward(self, x):
        return self.b(self.a(x))


def frozen_part():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    model[1].train()
    return model


def batch_statistics():
    return nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: nn.Linear(6, 3), "'Linear' is in training mode: call model.eval"),
        (frozen_part, "'1' is in training mode"),
        (lambda: Noisy(6, 3).eval(), "two different outputs or losses"),
        (lambda: Centred(6, 3).eval(), "samples mix in the model"),
        (batch_statistics, "samples mix in the model"),
        (lambda: Counting(6, 3).eval(), "forward pass changes 'count'"),
        (lambda: Shared().eval(), "share memory without being one parameter"),
        (lambda: nn.Linear(6, 3).requires_grad_(False).eval(), "no parameter that requires a gradient"),
        (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3).double()).eval(), "one dtype on one device"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.Flatten(0)).eval(), "sample axis"),
    ],
)
def test_a_model_that_is_no_fixed_function_is_refused(model, sentence, untouched):
    case, model = cases.make("mlp"), model()
    with pytest.raises(UserError, match=sentence):
        Landscape(model, case.batches([20, 4]), case.loss)


WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (nn.CrossEntropyLoss(weight=WEIGHTS), "weighs samples unequally"),
        (nn.CrossEntropyLoss(ignore_index=1), "weighs samples unequally"),
        (nn.CrossEntropyLoss(reduction="sum"), "it is a sum: divide it"),
        (lambda o, t: F.cross_entropy(o, t) + 0.1 * torch.randn(()), "two different outputs or losses"),
        (lambda o, t: F.cross_entropy(o, t) * np.nan, "must be finite, but is {'all': nan}"),
        (lambda o, t: o, r"shape \(\) or, one loss per sample, \((\d+),\), got shape \(\1, 3\)"),
        (lambda o, t: F.cross_entropy(o, t).item(), "got a float"),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_refused(loss, sentence, untouched):
    case = cases.make("mlp")
    with untouched(case.model), pytest.raises(UserError, match=sentence):
        Landscape(case.model, case.batches([20, 4]), loss)


class CentredSequence(nn.Linear):
    def forward(self, x):
        x = x.mean(1)
        return super().forward(x - x.mean(0) * (len(x) > 1))


@pytest.mark.parametrize("lengths", [[2] * 24, [2 + i % 3 for i in range(24)], [2, 3, 2]])
@pytest.mark.parametrize("strata", [False, True])
def test_samples_that_mix_are_refused_also_if_they_are_given_one_by_one(lengths, strata):
    pieces = [(torch.randn(1, n, 6, generator=rng("one", i)), torch.tensor([i % 3])) for i, n in enumerate(lengths)]
    data = {str(i): [piece] for i, piece in enumerate(pieces)} if strata else pieces
    with pytest.raises(UserError, match="samples mix in the model"):
        Landscape(CentredSequence(6, 3).eval(), data, F.cross_entropy)


def test_samples_of_different_shapes_are_never_joined():
    pieces = [(torch.randn(1, 2 + i, 6, generator=rng("one", i)), torch.tensor([i % 3])) for i in range(5)]
    landscape = Landscape(CentredSequence(6, 3).eval(), pieces, F.cross_entropy)
    assert not landscape.joinable
    with pytest.raises(UserError, match="Samples of different shapes cannot share a block"):
        landscape.gather(landscape.blocks(2)[0])


def test_statistics_of_a_batch_that_need_two_samples_are_refused_with_the_way_out():
    with pytest.raises(UserError, match="fails on 1 sample alone .*track_running_stats=True"):
        Landscape(batch_statistics(), [(torch.randn(1, 6), torch.zeros(1, dtype=torch.int64))], F.cross_entropy)


def test_ignored_targets_that_lie_evenly_are_found():
    case = cases.make("mlp")
    targets = case.targets.clone()
    targets[::4] = -100
    batches = [(case.inputs[:16], targets[:16]), (case.inputs[16:], case.targets[16:])]
    with pytest.raises(UserError, match="weighs samples unequally"):
        Landscape(case.model, batches, case.loss)


class Augmenting:
    def __init__(self, case):
        self.case, self.rng = case, rng("augmenting")

    def __iter__(self):
        return iter([(x + torch.randn(x.shape, generator=self.rng), y) for x, y in self.case.batches()])


class Once:
    def __init__(self, case):
        self.left = iter(case.batches())

    def __iter__(self):
        return self.left


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (lambda c: DataLoader(TensorDataset(c.inputs, c.targets), 5, shuffle=True), "neither shuffles nor augments"),
        (Augmenting, "neither shuffles nor augments"),
        (Once, "can be read again"),
        (lambda c: iter(c.batches()), "one-shot iterator"),
        (lambda c: (batch for batch in c.batches()), "one-shot iterator"),
        (lambda c: [], "hold no sample"),
        (lambda c: [(c.inputs[:0], c.targets[:0])], "hold no sample"),
        (lambda c: {}, "at least one stratum, got none"),
        (lambda c: {"a": c.batches(), "b": []}, "data of 'b' hold no sample"),
        (lambda c: c.inputs, "must be a pair"),
        (lambda c: [(c.inputs, c.targets[:3])], "share dimension 0"),
        (lambda c: [(c.inputs.numpy(), c.targets)], "nests of tensors"),
    ],
)
def test_data_that_change_or_lack_are_refused(data, sentence):
    case = cases.make("mlp")
    with pytest.raises(UserError, match=sentence):
        Landscape(case.model, data(case), case.loss)


def test_a_batch_size_needs_shapes_that_fit():
    case = cases.make("mlp")
    with pytest.raises(UserError, match="batch_size must be an integer >= 1, got 0"):
        case.landscape(batch_size=0)
    ragged = [(torch.ones(2, 3, 6), torch.ones(2)), (torch.ones(2, 4, 6), torch.ones(2))]
    with pytest.raises(UserError, match="batch_size"):
        Landscape(case.model, ragged, lambda o, t: o.mean(dim=(1, 2)), batch_size=2)


def test_patterns_and_vectors_that_do_not_fit_are_refused():
    case = cases.make("mlp")
    with pytest.raises(UserError, match="matches 'layer4.*'; available: 0.weight, 0.bias"):
        case.landscape(params=["0.*", "layer4.*"])
    with pytest.raises(UserError, match="empty list of patterns"):
        case.landscape(params=[])
    for call in (case.landscape().evaluate, case.landscape().hvp, case.landscape().gradient):
        with pytest.raises(UserError, match=r"shape \(53,\), got \(3,\)"):
            call(torch.zeros(3))


def test_a_model_that_was_changed_since_is_refused():
    case = cases.make("conv_bn")
    landscape = case.landscape()
    with landscape.moving() as at:
        at(direction(landscape, "open"), 1.0)
        with pytest.raises(UserError, match="open `moving`"):
            landscape.evaluate()
    case.model[1].running_mean.add_(1.0)
    with pytest.raises(UserError, match="'1.running_mean' has changed"):
        landscape.evaluate()
    landscape = case.landscape()
    case.model.train()
    with pytest.raises(UserError, match="training mode"):
        landscape.evaluate()
    case.model.eval()
    with torch.no_grad():
        case.model[0].weight.mul_(2.0)
    with pytest.raises(UserError, match="trained since"):
        landscape.gradient()


def failing(outputs, targets):
    raise RuntimeError("no loss")


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="sum"), failing])
def test_a_refused_landscape_leaves_an_open_one_usable(loss):
    case = cases.make("conv_bn")
    landscape = case.landscape()
    with pytest.raises((UserError, RuntimeError)):
        Landscape(case.model, case.batches([20, 4]), loss)
    assert np.isfinite(sphere_flatness(landscape, [0.1], num_samples=2).value).all()


def test_a_refused_landscape_whose_forward_pass_writes_leaves_an_open_one_usable():
    case, model = cases.make("mlp"), Counting(6, 3).eval()
    quiet = Landscape(model, case.batches([24]), case.loss, check=False)
    state = model.count.clone()
    with pytest.raises(UserError, match="forward pass changes 'count'"):
        Landscape(model, case.batches([24]), case.loss)
    assert torch.equal(model.count, state) and quiet.weights.tolist() == [24.0]


def test_landscapes_of_different_parameters_of_one_model_can_be_open_together():
    case = cases.make("mlp")
    names = list(dict(case.model.named_parameters()))
    part = Landscape(case.model, case.batches([24]), case.loss, params=names[0])
    before = part.evaluate().loss
    sphere_flatness(case.landscape(), [0.1], num_samples=2)
    assert part.evaluate().loss == before
    with torch.no_grad():
        case.model.get_parameter(names[1]).add_(1.0)
    with pytest.raises(UserError, match=f"'{names[1]}' has changed since"):
        part.evaluate()


def test_step_sizes_are_not_moved_as_if_they_were_weights():
    case = cases.make("conv_bn")
    attach(case.model, bits=4)
    case.model.eval()
    with pytest.raises(UserError, match=r"belongs to the parametrization of .*: bake\(model\) first"):
        case.landscape()
    for scale in scales(case.model).values():
        scale.requires_grad_(False)
    latent = case.landscape()
    bake(case.model)
    assert case.landscape().num_params == latent.num_params


def test_samples_without_weight_count_in_no_accuracy():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none", ignore_index=-100), (targets != -100).float()

    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(3 * torch.eye(2))
    inputs, targets = torch.eye(2).repeat(8, 1), torch.arange(2).repeat(8)
    targets[:8], targets[8] = -100, 1  # eight count, seven of which are right
    found = Landscape(model, [(inputs, targets)], loss).evaluate()
    assert found.accuracy == 7 / 8 and found.loss == pytest.approx(loss(model(inputs), targets)[0].sum().item() / 8)


@pytest.mark.parametrize("which", [0, 1])
def test_data_that_were_written_to_are_refused(which):
    batch = torch.randn(8, 4), torch.arange(8) % 3
    landscape = Landscape(nn.Linear(4, 3).eval(), [batch], F.cross_entropy)
    landscape.evaluate()
    batch[which].mul_(0)
    with pytest.raises(UserError, match="The data have been written to"):
        landscape.evaluate()


def test_a_model_is_a_module():
    with pytest.raises(UserError, match="must be a torch.nn.Module, got function"):
        Landscape(F.relu, [(torch.randn(4, 2), torch.arange(4) % 2)], F.cross_entropy)


def _most_alive(work):
    """Return the most bytes of tensors that some work keeps alive at a time, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [each.nbytes() for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(changes, initial=0))


@pytest.mark.parametrize("normalisation", ["none", "filter"])
def test_opening_and_measuring_take_few_copies_of_the_parameters(normalisation):
    """A network of many parameters and few activations: the landscape's copy, the moved point and the direction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), nn.Linear(2048, 1024)).eval()
    data = [(torch.randn(4, 1024), torch.arange(4))]
    vector = 4 * sum(each.numel() for each in model.parameters())
    made = []
    opened = _most_alive(lambda: made.append(Landscape(model, data, F.cross_entropy)))
    assert opened < 4.2 * vector  # its own copy, a direction, the gradient, and one layer's while it is computed
    words = {"num_samples": 2, "normalisation": normalisation}
    assert _most_alive(lambda: sphere_flatness(made[0], [0.1, 0.2], **words)) < 2.7 * vector
    assert _most_alive(lambda: sphere_flatness(made[0], "auto", **words)) < 2.7 * vector  # nor while radii are found
