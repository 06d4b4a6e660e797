"""Step rules against closed forms and a re-implementation; evaluation and selection against counts by hand."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stores import PLACE, content, spec, trained
from torch import nn

from flatlab import files
from flatlab.data.batches import Batch
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.models import networks
from flatlab.models.networks import build_network, set_training
from flatlab.quant.attach import attach, quantized_layers
from flatlab.specs.methods import Method, compose
from flatlab.specs.run import Place, StepSpec
from flatlab.specs.settings import SMOKE
from flatlab.store import selection
from flatlab.store.runs import RunStore
from flatlab.train.evaluate import evaluate, mean
from flatlab.train.loop import train
from flatlab.train.objectives import erm
from flatlab.train.steps import SAGM, SAM, SAQ, Plain
from flatlab.train.trajectory import Trajectory


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def digits_network(dtype=torch.float32):
    return build_network("digits-cnn", num_classes=10, in_channels=1).to(dtype).train()


def images(dtype=torch.float32):
    return random(12, 1, 16, 16, dtype=dtype), torch.arange(12) % 10


def closure_of(network, seen=None):
    inputs, targets = images(next(network.parameters()).dtype)

    def closure():
        if seen is not None:
            seen.append({name: p.detach().clone() for name, p in network.named_parameters()})
        loss = F.cross_entropy(network(inputs), targets)
        loss.backward()
        return loss.detach()

    return closure


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- SAM ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.05, 3.0])
def test_sam_on_a_quadratic_is_the_closed_form(rho):
    root = random(5, 5, dtype=torch.float64)
    hessian = root @ root.T
    model = nn.Module()
    model.a, model.b = nn.Parameter(random(2, seed=1, dtype=torch.float64)), nn.Parameter(random(3, seed=2).double())
    points = []

    def closure():
        w = torch.cat([model.a, model.b])
        points.append(w.detach().clone())
        loss = 0.5 * w @ hessian @ w
        loss.backward()
        return loss.detach()

    rule = SAM(torch.optim.SGD(model.parameters(), lr=1.0), model, model.parameters(), rho=rho)
    loss = rule.step(closure)
    start, up = points
    slope = hessian @ start
    torch.testing.assert_close((up - start).norm(), torch.tensor(rho, dtype=torch.float64), rtol=1e-11, atol=0)
    applied = start - torch.cat([model.a, model.b]).detach()
    torch.testing.assert_close(applied, hessian @ (start + rho * slope / slope.norm()), rtol=1e-10, atol=1e-10)
    assert loss == 0.5 * start @ hessian @ start  # the loss before the update, not that at the top


def test_sam_without_a_radius_is_the_plain_step_to_the_bit():
    plain, sharp = digits_network(), digits_network()
    adam = [torch.optim.Adam(network.parameters(), lr=1e-2) for network in (plain, sharp)]
    rules = Plain(adam[0]), SAM(adam[1], sharp, sharp.parameters(), rho=0.0)
    for _ in range(3):
        losses = [rule.step(closure_of(network)) for rule, network in zip(rules, (plain, sharp), strict=True)]
        assert losses[0] == losses[1]
    assert same_bits(plain.state_dict(), sharp.state_dict())
    assert sharp.state_dict()["features.1.num_batches_tracked"] == 3


def test_sam_leaves_weights_and_statistics_where_one_pass_would():
    network = digits_network()
    before = copy.deepcopy(network)
    seen = []
    rule = SAM(torch.optim.SGD(network.parameters(), lr=0.0), network, network.parameters(), rho=0.5)
    rule.step(closure_of(network, seen))
    assert not same_bits(seen[0], seen[1])
    closure_of(before)()  # one forward pass at the weights themselves
    assert same_bits(network.state_dict(), before.state_dict())
    assert all(layer.track_running_stats for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))


def test_sam_is_the_published_rule():
    """Foret et al. 2021, Algorithm 1, written anew as a function, on a conv+BN network under Adam."""
    network = digits_network(torch.float64)
    twin = copy.deepcopy(network)
    rule = SAM(torch.optim.Adam(network.parameters(), lr=1e-2), network, network.parameters(), rho=0.7)
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2)
    inputs, targets = images(torch.float64)

    def gradient(point):
        point = {name: value.clone().requires_grad_() for name, value in point.items()}
        buffers = {name: b.clone() for name, b in twin.named_buffers()}
        loss = F.cross_entropy(torch.func.functional_call(twin, {**point, **buffers}, inputs), targets)
        return dict(zip(point, torch.autograd.grad(loss, list(point.values())), strict=True))

    for _ in range(3):
        rule.step(closure_of(network))
        w = {name: p.detach().clone() for name, p in twin.named_parameters()}
        first = gradient(w)
        norm = sum((g**2).sum() for g in first.values()).sqrt()
        for name, g in gradient({name: w[name] + 0.7 * first[name] / norm for name in w}).items():
            twin.get_parameter(name).grad = g
        adam.step()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(network.get_parameter(name), p, rtol=1e-7, atol=1e-9)


def test_sam_moves_latent_weights_and_not_step_sizes(tmp_path):
    spec = compose(Method(step="sam", quantizer="lsq"), SMOKE, held_out="rot0", seed=0, trial_seed=0)
    place = Place(device="cpu")
    trajectory = Trajectory([RunStore(tmp_path).run(spec)], loading_data.domains(spec, place), place)
    trajectory.switch()
    set_training(trajectory.network, freeze_batchnorm=False)
    seen = []
    trajectory.step_rule().step(closure_of(trajectory.network, seen))
    scales = loading_network.roles(trajectory.network)["scales"]
    assert len(scales) == 3
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in scales)
    moved = [(seen[1][name] - seen[0][name]).double() for name in seen[0] if name not in scales]
    assert all(part.any() for part in moved)
    assert torch.cat([part.flatten() for part in moved]).norm().item() == pytest.approx(spec.step.rho, rel=1e-4)
    after = dict(trajectory.network.named_parameters())
    assert not any(torch.equal(seen[0][name], after[name]) for name in scales)  # the step itself does move them


# --- SAGM, SAQ ---------------------------------------------------------------------------------------------------


def quadratic(seen):
    """A parameter in two parts, and the closure of f = w'Aw/2, which notes where it is called."""
    root = random(5, 5, dtype=torch.float64)
    model = nn.Module()
    model.a, model.b = nn.Parameter(random(2, seed=1, dtype=torch.float64)), nn.Parameter(random(3, seed=2).double())

    def closure():
        w = torch.cat([model.a, model.b])
        seen.append(w.detach().clone())
        loss = 0.5 * w @ (root @ root.T) @ w
        loss.backward()
        return loss.detach()

    return model, root @ root.T, closure


@pytest.mark.parametrize(("rho", "alpha"), [(0.05, 1e-3), (3.0, 0.2), (0.0, 0.3)])
def test_sagm_on_a_quadratic_is_the_closed_form(rho, alpha):
    points = []
    model, hessian, closure = quadratic(points)
    SAGM(torch.optim.SGD(model.parameters(), lr=1.0), model, model.parameters(), rho=rho, alpha=alpha).step(closure)
    start, up = points
    slope = hessian @ start
    expected = (torch.eye(5).double() + (rho / slope.norm() - alpha) * hessian) @ start
    torch.testing.assert_close(up, expected, rtol=1e-10, atol=1e-10)
    applied = start - torch.cat([model.a, model.b]).detach()
    torch.testing.assert_close(applied, 0.5 * slope + 0.5 * hessian @ expected, rtol=1e-10, atol=1e-10)


def test_sagm_with_the_ascent_taken_off_whole_is_plain_descent():
    points = []
    model, hessian, closure = quadratic(points)
    norm = (hessian @ torch.cat([model.a, model.b]).detach()).norm().item()
    rule = SAGM(torch.optim.SGD(model.parameters(), lr=1.0), model, model.parameters(), rho=2 * norm, alpha=2.0)
    rule.step(closure)
    ended = torch.cat([model.a, model.b]).detach()
    torch.testing.assert_close(ended, points[0] - hessian @ points[0], rtol=1e-9, atol=1e-9)


def test_sagm_without_alpha_climbs_as_sam_and_without_a_radius_is_the_plain_step_to_the_bit():
    climbed = {}
    for kind, options in {"sam": {"rho": 0.7}, "sagm": {"rho": 0.7, "alpha": 0.0}}.items():
        network = digits_network()
        rule = {"sam": SAM, "sagm": SAGM}[kind](
            torch.optim.SGD(network.parameters(), lr=0.0), network, network.parameters(), **options
        )
        rule.step(closure_of(network, climbed.setdefault(kind, [])))
    assert same_bits(climbed["sam"][1], climbed["sagm"][1]) and not same_bits(climbed["sam"][0], climbed["sam"][1])
    plain, matched = digits_network(), digits_network()
    adam = [torch.optim.Adam(network.parameters(), lr=1e-2) for network in (plain, matched)]
    rules = Plain(adam[0]), SAGM(adam[1], matched, matched.parameters(), rho=0.0, alpha=0.0)
    for _ in range(3):
        for rule, network in zip(rules, (plain, matched), strict=True):
            rule.step(closure_of(network))
    assert same_bits(plain.state_dict(), matched.state_dict())


def test_weight_decay_is_applied_once_and_is_no_part_of_the_ascent():
    points = []
    model, hessian, closure = quadratic(points)
    rule = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    SAGM(rule, model, model.parameters(), rho=0.7, alpha=0.2).step(closure)
    start, up = points
    slope = hessian @ start
    torch.testing.assert_close(up, start + (0.7 / slope.norm() - 0.2) * slope, rtol=1e-10, atol=1e-10)
    applied = start - torch.cat([model.a, model.b]).detach()
    torch.testing.assert_close(applied, 0.5 * slope + 0.5 * hessian @ up + 0.1 * start, rtol=1e-10, atol=1e-10)


def dropping(channels, *, build=networks.MODELS["digits-cnn"]):
    """digits-cnn with dropout, as some networks of timm have it."""
    features, width = build(channels)
    return nn.Sequential(nn.Dropout(0.3), features), width  # in front of BatchNorm, whose statistics it changes


def test_both_passes_of_a_step_have_one_dropout_mask_and_a_resumed_training_has_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.MODELS, "digits-cnn", dropping)
    parts = {"step": StepSpec(kind="sagm", rho=0.0, alpha=0.0), "average": spec("SWA").average}
    twice = spec("SAGM", weight_decay=0.1).replace(**parts)
    once, before = twice.replace(step=StepSpec()), torch.get_rng_state()
    store = trained(tmp_path / "whole", twice)
    train([once], store, PLACE)
    first, second = (files.load_arrays(store.run(each).checkpoint("last"))[0] for each in (twice, once))
    assert all(np.array_equal(first[name], second[name]) for name in second), "the mean of two equal gradients is each"
    assert torch.equal(torch.get_rng_state(), before)

    def stop(done, of, shown):
        if done == 6:
            raise KeyboardInterrupt

    resumed = RunStore(tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        train([once], resumed, PLACE, report=stop)
    torch.rand(3)  # the process's own draws change no mask
    train([once], resumed, PLACE)
    last = "checkpoints/last.safetensors"
    assert content(resumed.run(once))[last] == content(store.run(once))[last]


@pytest.mark.parametrize("kind", [SAGM, SAQ])
def test_two_passes_leave_weights_and_statistics_where_one_would(kind):
    network = digits_network()
    attach(network, bits=3)
    before = copy.deepcopy(network)
    seen = []
    latent = [each.latent for each in quantized_layers(network).values()]
    moved = [p for p in network.parameters() if all(p is not each for each in latent) and p.dim() < 4]
    options = {"alpha": 1e-3} if kind is SAGM else {}
    kind(torch.optim.SGD(network.parameters(), lr=0.0), network, moved, rho=0.5, **options).step(
        closure_of(network, seen)
    )
    assert not same_bits(seen[0], seen[1])
    closure_of(before)()
    assert same_bits(network.state_dict(), before.state_dict())
    inputs, _ = images()
    assert torch.equal(network.eval()(inputs), before.eval()(inputs))  # no hook is left


def quantized_quadratic(scale, bits):
    """A linear map whose weight is quantized, and the loss of its outputs."""
    network = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        for index, layer in enumerate(network):
            layer.weight.copy_(random(*layer.weight.shape, seed=index))
    attach(network, bits=bits, granularity="tensor", outside="1")
    with torch.no_grad():
        quantized_layers(network)["0"].quantizer.scale.fill_(scale)
    inputs, losses = random(9, 6, seed=5), []

    def closure():
        loss = network(inputs).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss.detach()

    return network, closure, losses


def test_a_step_that_moves_no_code_is_nothing_to_sam_and_something_to_saq():
    losses = {}
    for kind in (SAM, SAQ):
        network, closure, losses[kind] = quantized_quadratic(scale=1.0, bits=3)
        each = quantized_layers(network)["0"]
        codes = each.quantizer.codes(each.latent)
        rule = kind(torch.optim.SGD(network.parameters(), lr=0.0), network, [each.latent] * (kind is SAM), rho=1e-3)
        rule.step(closure)
        assert torch.equal(each.quantizer.codes(each.latent), codes)
    assert losses[SAM][0] == losses[SAM][1] == losses[SAQ][0]
    assert losses[SAQ][1] > losses[SAQ][0]


def test_saq_of_many_bits_is_sam_at_the_latent_weights():
    ends = {}
    for kind in (SAM, SAQ):
        network, closure, _ = quantized_quadratic(scale=1e-3, bits=16)
        each = quantized_layers(network)["0"]
        others = [network[1].weight]
        moved = [each.latent, *others] if kind is SAM else others
        kind(torch.optim.SGD([each.latent, *others], lr=0.1), network, moved, rho=0.5).step(closure)
        ends[kind] = torch.cat([each.latent.detach().flatten(), network[1].weight.detach().flatten()])
    torch.testing.assert_close(ends[SAM], ends[SAQ], rtol=0, atol=3e-3)
    assert (ends[SAM] - ends[SAQ]).abs().max() > 0


def test_saqs_ascent_has_the_radius_over_quantized_weights_and_the_rest():
    network, closure, _ = quantized_quadratic(scale=0.3, bits=4)
    each, shown = quantized_layers(network)["0"], []
    plain = each.weight
    rule = SAQ(torch.optim.SGD(network.parameters(), lr=0.0), network, [network[1].weight], rho=0.25)

    def watching():
        shown.append((network[0].weight.detach().clone(), network[1].weight.detach().clone()))
        return closure()

    rule.step(watching)
    assert torch.equal(shown[0][0], plain)
    shifts = [(after - before).double() for before, after in zip(*shown, strict=True)]
    assert all(shift.any() for shift in shifts)
    assert sum(shift.square().sum() for shift in shifts).sqrt().item() == pytest.approx(0.25, rel=1e-5)


def test_what_an_ascent_moves_is_chosen_by_perturb(tmp_path):
    place, moved = Place(device="cpu"), {}
    for step, perturb in itertools.product(("sam", "sagm", "saq"), ("weights", "all")):
        setting = SMOKE.replace(perturb=perturb, activations="unsigned")
        spec = compose(Method(step=step, quantizer="lsq"), setting, held_out="rot0", seed=0, trial_seed=0)
        trajectory = Trajectory([RunStore(tmp_path).run(spec)], loading_data.domains(spec, place), place)
        trajectory.switch()
        names = {id(parameter): name for name, parameter in trajectory.network.named_parameters()}
        moved[step, perturb] = {names[id(each)] for each in trajectory._moved()}
        every = set(names.values())
    steps = {name for name in every if name.endswith("scale")}
    inputs = {name for name in steps if "activations" in name}
    latent = {name for name in every if name.endswith("original")}
    assert len(inputs) == len(latent) == 3 and len(steps) == 6
    assert moved["sam", "weights"] == moved["sagm", "weights"] == every - steps
    assert moved["sam", "all"] == moved["sagm", "all"] == every
    assert moved["saq", "weights"] == every - steps - latent
    assert moved["saq", "all"] == every - (steps - inputs) - latent


def test_saq_needs_a_quantizer():
    with pytest.raises(UserError, match="saq needs a quantizer in training; add --quantizer lsq, or choose --step sam"):
        compose(Method(step="saq"), SMOKE, held_out="rot0", seed=0, trial_seed=0)


# --- objectives, evaluation --------------------------------------------------------------------------------------


def test_erm_is_the_mean_over_all_sources_images():
    network = digits_network().eval()
    inputs, targets = images()
    by_hand = torch.stack([F.cross_entropy(network(inputs)[i], targets[i]) for i in range(12)]).mean()
    torch.testing.assert_close(erm(network, Batch(inputs, targets, (4, 4, 4))), by_hand)


class Lookup(nn.Module):
    """Logits are the inputs; in training mode they would be others."""

    def __init__(self):
        super().__init__()
        self.frozen, self.live = nn.BatchNorm1d(3).eval(), nn.Dropout(0.5)

    def forward(self, inputs):
        return self.live(inputs)


def test_images_weigh_the_same_within_a_domain_and_domains_in_the_mean():
    logits, targets = random(7, 3, seed=5), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    cut = [(x, y) for x, y in zip(logits.split([5, 2]), targets.split([5, 2]), strict=True)]
    scores = evaluate(Lookup().train(), {"big": cut, "small": cut[1:]})
    losses = F.cross_entropy(logits.double(), targets, reduction="none")
    hits = logits.argmax(1) == targets
    assert scores["big"] == {
        "accuracy": pytest.approx(hits.double().mean().item()),
        "loss": pytest.approx(losses.mean().item(), rel=1e-6),
        "n": 7,
    }
    assert scores["small"]["loss"] == pytest.approx(losses[5:].mean().item(), rel=1e-6)
    assert mean(scores, "loss") == (scores["big"]["loss"] + scores["small"]["loss"]) / 2


def test_evaluating_leaves_each_modules_mode(untouched):
    model = Lookup().train()
    model.frozen.eval()
    with untouched(model):
        evaluate(model, {"one": [(random(4, 3), torch.zeros(4, dtype=torch.long))]})
    assert model.live.training and not model.frozen.training


# --- selection ---------------------------------------------------------------------------------------------------


def row(step, validation, outside):
    target = {"in": {"accuracy": 1 - outside}, "out": {"accuracy": outside}}
    return {"step": step, "validation": validation, "target": target}


ROWS = [row(0, 0.9, 0.1), row(5, 0.7, 0.6), row(10, 0.8, 0.7), row(15, 0.8, 0.7), row(20, 0.1, 0.2)]


@pytest.mark.parametrize(
    ("rule", "switch", "step"),
    [
        ("training-domain", None, 0),
        ("training-domain", 10, 10),  # of equals the first
        ("training-domain", 11, 15),
        ("oracle", None, 10),
        ("oracle", 15, 15),
        ("last", None, 20),
    ],
)
def test_selection(rule, switch, step):
    assert selection.RULES[rule](selection.candidates(ROWS, switch))["step"] == step


def test_a_row_at_the_switch_is_already_quantized():
    assert [r["step"] for r in selection.candidates(ROWS, 10)] == [10, 15, 20]
    assert selection.candidates(ROWS, 21) == []
