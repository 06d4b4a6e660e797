"""Adaptive sharpness against closed forms on quadratics and slopes, and against what it must not see."""

import itertools

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spectra import normal, rotated
from torch import nn

from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness import sharpness
from flatlab.metrics.flatness.sharpness import average_sharpness, normalised_logits, worst_sharpness
from flatlab.metrics.flatness.sphere import sphere_flatness

EIGENVALUES = np.linspace(0.1, 4.0, 8)
START = normal("sharpness", "w", shape=(8,))
SLOPE = normal("sharpness", "slope", shape=(8,))


def bowl(slope=None):
    """1/2 (w - START)' H (w - START) + slope' w as a function of w, at START."""
    hessian = rotated(EIGENVALUES, "sharpness")

    class Bowl(cases.Quadratic):
        def forward(self, x):
            step = self.w - START
            return 0.5 * step @ self.hessian @ step + self.slope @ self.w + 0 * x

    return Bowl(hessian, start=START, slope=slope).landscape(), hessian


def scales(adaptive):
    return START.abs() if adaptive else torch.ones_like(START)


ADAPTIVE = pytest.mark.parametrize("adaptive", [True, False])


@ADAPTIVE
@pytest.mark.parametrize(("norm", "variance"), [("l2", 1.0), ("linf", 1 / 3)])
def test_the_average_on_a_quadratic_is_its_weighted_trace(norm, variance, adaptive):
    landscape, hessian = bowl(SLOPE)  # antithetic pairs take the slope out
    radii = np.array([0.1, 1.0])
    found = average_sharpness(landscape, radii, norm=norm, adaptive=adaptive, rel_error=0.02, budget=60_000)
    exact = 0.5 * radii**2 * variance * (hessian.diagonal() * scales(adaptive) ** 2).sum().item()
    low, high = found.interval(0.999)
    assert found.converged and ((low < exact) & (exact < high)).all()
    assert found.value == pytest.approx(exact, rel=0.1)


@ADAPTIVE
def test_the_worst_in_the_ball_is_an_eigenvalue(adaptive):
    landscape, hessian = bowl()
    c = scales(adaptive)
    top = torch.linalg.eigvalsh(c[:, None] * hessian * c)[-1].item()
    found = worst_sharpness(landscape, [0.5, 2.0], norm="l2", adaptive=adaptive, steps=60, restarts=3)
    assert found.value == pytest.approx(np.array([0.5, 2.0]) ** 2 * top / 2, rel=1e-3)


@ADAPTIVE
def test_the_worst_in_the_box_is_at_a_corner(adaptive):
    landscape, hessian = bowl()
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=8)), dtype=torch.float64) * scales(adaptive)
    top = (0.5 * (corners @ hessian * corners).sum(1)).max().item()
    found = worst_sharpness(landscape, [0.3], norm="linf", adaptive=adaptive, steps=20, restarts=40)
    assert found.value[0] == pytest.approx(0.09 * top, rel=1e-6)
    assert found.rises.max() <= 0.09 * top * (1 + 1e-9)


@ADAPTIVE
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_worst_on_a_slope_is_the_dual_norm(norm, adaptive):
    flat = torch.zeros(8, 8, dtype=torch.float64)
    landscape = cases.Quadratic(flat, start=START, slope=SLOPE).landscape()
    found = worst_sharpness(landscape, [0.7], norm=norm, adaptive=adaptive, steps=10)
    slope = scales(adaptive) * SLOPE
    assert found.value[0] == pytest.approx(0.7 * torch.linalg.vector_norm(slope, 2 if norm == "l2" else 1).item())


def test_without_a_radius_nothing_rises():
    landscape = cases.make("mlp").landscape()
    assert average_sharpness(landscape, [0.0], num_samples=2).value[0] == 0
    assert worst_sharpness(landscape, [0.0], steps=2).value[0] == 0


def relu_net(factor):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    with torch.no_grad():
        model[0].weight *= factor
        model[0].bias *= factor
        model[2].weight /= factor
    x = normal("relu", shape=(24, 6))
    return Landscape(model, [(x[:20], torch.arange(20) % 3), (x[20:], torch.arange(4) % 3)], F.cross_entropy)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adaptive_sharpness_is_blind_to_a_rescaling_and_the_plain_one_is_not(norm):
    def numbers(factor, adaptive):
        given = {"norm": norm, "adaptive": adaptive, "block_size": 8}
        landscape = relu_net(factor)
        mean = average_sharpness(landscape, [0.2], num_samples=20, **given)
        return mean.value[0], worst_sharpness(landscape, [0.2], steps=8, **given).value[0]

    assert numbers(1.0, True) == pytest.approx(numbers(8.0, True), rel=1e-9)
    for one, eight in zip(numbers(1.0, False), numbers(8.0, False), strict=True):
        assert one != pytest.approx(eight, rel=0.1)


def test_logits_that_are_normalised_have_no_size():
    def loss_of(factor, loss):
        logits, targets = normal("logits", shape=(12, 4)), torch.arange(12) % 4
        return loss(factor * logits + 5.0, targets).item()

    free = normalised_logits(F.cross_entropy)
    assert loss_of(1.0, free) == pytest.approx(loss_of(100.0, free), rel=1e-12)
    assert loss_of(1.0, F.cross_entropy) != pytest.approx(loss_of(100.0, F.cross_entropy), rel=0.1)
    centred = normal("logits", shape=(12, 4))
    centred -= centred.mean(1, keepdim=True)
    by_hand = F.cross_entropy(centred / centred.square().sum(1, keepdim=True).sqrt(), torch.arange(12) % 4)
    assert loss_of(1.0, free) == pytest.approx(by_hand.item(), rel=1e-12)
    constant = torch.ones(2, 3)  # has no direction, and no NaN either
    assert torch.isfinite(free(constant, torch.tensor([0, 1])))


def test_the_adaptive_average_is_the_sphere_by_parameter():
    landscape = cases.make("conv_bn").landscape()
    ours = average_sharpness(landscape, [0.1, 0.2], num_samples=6, seed=3)
    theirs = sphere_flatness(landscape, [0.1, 0.2], num_samples=6, seed=3, normalisation="parameter")
    assert np.array_equal(ours.value, theirs.value)


@pytest.mark.parametrize("name", cases.MODELS)
def test_the_worst_in_the_box_is_above_the_mean_in_it(name, untouched):
    case = cases.make(name)
    with untouched(case.model):
        landscape = case.landscape(cases.CUTS["uneven"])
        worst = worst_sharpness(landscape, [0.1], block_size=8, steps=5, restarts=2)
        mean = average_sharpness(landscape, [0.1], norm="linf", num_samples=8)
    assert worst.rises.shape == (1, 3, 2)
    assert worst.value[0] > mean.value[0]


def test_the_ascent_stays_in_the_ball_and_its_best_point_is_what_it_says(monkeypatch):
    seen, true = [], sharpness._Ascent._loss

    def watched(self, u):
        seen.append((u.clone(), true(self, u)))
        return seen[-1][1]

    monkeypatch.setattr(sharpness._Ascent, "_loss", watched)
    landscape = cases.make("conv_bn").double().landscape()
    for norm, order in (("l2", 2), ("linf", torch.inf)):
        seen.clear()
        found = worst_sharpness(landscape, [0.3], norm=norm, steps=12)
        assert max(torch.linalg.vector_norm(u, order).item() for u, _ in seen) <= 0.3 * (1 + 1e-9)
        assert found.value[0] == pytest.approx(max(loss for _, loss in seen) - landscape.base_loss[0], rel=1e-9)


@pytest.mark.parametrize("way", [average_sharpness, worst_sharpness])
def test_the_result_depends_on_the_seed(way):
    landscape = cases.make("mlp").landscape()
    given = {"num_samples": 3} if way is average_sharpness else {"steps": 1}
    one, same, other = (way(landscape, [0.3], seed=seed, **given).value[0] for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("cut", [(5, 12, 7), (1, 22, 1), (2, 2, 20)])
@pytest.mark.parametrize("block_size", [3, 8, 24])
def test_the_mean_of_the_blocks_landscapes_is_the_landscape(cut, block_size):
    case = cases.make("mlp").double()
    batches = case.batches(cut)
    landscape = Landscape(case.model, {"few": batches[:1], "many": batches[1:2], "rest": batches[2:]}, case.loss)
    parts = [landscape.on(block) for block in landscape.blocks(block_size, seed=0)]
    there = landscape.point + 0.3 * normal("there", shape=(landscape.num_params,))
    assert {part.strata for part in parts} == {landscape.strata}
    assert np.mean([part.base_loss for part in parts], axis=0) == pytest.approx(landscape.base_loss, rel=1e-12)
    assert np.mean([part.evaluate(there).loss for part in parts]) == pytest.approx(landscape.evaluate(there).loss)
    slopes = torch.stack([part.gradient(there) for part in parts]).mean(0)
    assert torch.allclose(slopes, landscape.gradient(there), rtol=1e-9, atol=1e-12)
    assert [part.num_samples for part in parts] == landscape.blocks(block_size, seed=0).sizes.tolist()


class Steep(nn.Module):
    """The loss of a sample is its size times |w|^2 / 2."""

    def __init__(self, size=1):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return x * self.w.square().sum() / 2


def test_a_rare_stratum_weighs_as_much_as_a_common_one():
    """One sample of curvature 16 beside 2,047 flat ones: worst 4 in the box of 1, mean 4/3, by closed form."""
    data = {
        "rare": [(torch.full((1, 1), 16.0, dtype=torch.float64), torch.zeros(1))],
        "common": [(torch.zeros(2047, 1, dtype=torch.float64), torch.zeros(2047))],
    }
    landscape = Landscape(Steep().eval(), data, lambda outputs, _: outputs[:, 0])
    worst = worst_sharpness(landscape, [1.0], norm="linf", adaptive=False)
    average = average_sharpness(landscape, [1.0], norm="linf", adaptive=False)
    low, high = average.interval(0.999)
    assert worst.value[0] == pytest.approx(4.0) and low[0] < 4 / 3 < high[0]
    assert average.value[0] == pytest.approx(4 / 3, rel=0.2)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_worst_is_above_the_average_and_above_any_point(seed, norm):
    rng = np.random.default_rng(seed)
    cut = [int(size) for size in rng.choice([1, 2, 7, 40], size=3)]
    case, radius = cases.make("mlp").double(), float(rng.uniform(0.05, 0.5))
    inputs = normal("random problem", seed, shape=(sum(cut), 6)) * torch.tensor(rng.lognormal(0, 1, (sum(cut), 1)))
    targets = torch.from_numpy(rng.integers(0, 3, sum(cut)))
    data = {str(i): [pair] for i, pair in enumerate(zip(inputs.split(cut), targets.split(cut), strict=True))}
    landscape = Landscape(case.model, data, case.loss)
    given = {"norm": norm, "adaptive": bool(seed % 2)}
    worst = worst_sharpness(landscape, [radius], block_size=8, restarts=3, seed=seed, **given).value[0]
    scale = landscape.point.abs() if given["adaptive"] else torch.ones_like(landscape.point)
    for k in range(30):
        u = normal("any point", seed, k, shape=(landscape.num_params,))
        u = u.clamp(-1, 1) if norm == "linf" else u / u.norm()
        there = landscape.evaluate(landscape.point + radius * scale * u).loss
        assert there - landscape.base_loss.mean() <= worst
    if norm == "linf":  # normal noise leaves the ball
        assert average_sharpness(landscape, [radius], num_samples=100, **given).value[0] <= worst


def test_what_does_not_do_is_said():
    landscape = cases.make("mlp").landscape()
    for way in (average_sharpness, worst_sharpness):
        with pytest.raises(UserError, match="radii must be one or more finite numbers >= 0"):
            way(landscape, [-1.0])
        with pytest.raises(UserError, match="Unknown norm 'l1'.*: l2, linf"):
            way(landscape, [0.1], norm="l1")
    with pytest.raises(UserError, match="steps must be an integer >= 1, got 0"):
        worst_sharpness(landscape, [0.1], steps=0)
