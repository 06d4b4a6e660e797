"""The pilot finds the variance components, and the plan that follows is the one that they call for."""

import cases
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatlab import seeds
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness import perturbations, pilot
from flatlab.metrics.flatness.pilot import Pilot
from flatlab.metrics.flatness.sampler import Goal, Sampler, settled
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.results.estimate import Components

SIZE, DIMENSION = 512, 40


class Images(nn.Module):
    """Image x rises by a_x |w|^2 / 2 + b_x.w: curvatures and slopes of its own, on a sphere in closed form."""

    def __init__(self, curvatures, slopes):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(DIMENSION, dtype=torch.float64))
        self.register_buffer("curvatures", curvatures)
        self.register_buffer("slopes", slopes)

    def forward(self, index):
        return 0.5 * self.curvatures[index] * (self.w @ self.w) + self.slopes[index] @ self.w


def images(slope=1.0, common=0.0):
    rng = seeds.generator("pilot")
    curvatures = 1.0 + torch.rand(SIZE, generator=rng, dtype=torch.float64)
    slopes = slope * torch.randn(SIZE, DIMENSION, generator=rng, dtype=torch.float64)
    slopes = slopes - slopes.mean(0)
    slopes[:, 0] += common
    index = torch.arange(SIZE)
    model = Images(curvatures, slopes).eval()
    return model, Landscape(model, [(index, torch.zeros(SIZE))], lambda outputs, targets: outputs)


def pilot_of(landscape, radii, seed=0):
    return pilot.run_pilot([landscape], np.array(radii), seed=seed, normalisation="none", value=lambda rises: rises[0])


def test_components_are_those_of_quadratic_images():
    model, landscape = images(slope=1.0, common=2.0)
    found = [pilot_of(landscape, [0.5, 2.0], seed) for seed in range(12)]
    curvature, slopes = model.curvatures.numpy(), model.slopes.numpy()
    for index, gamma in enumerate((0.5, 2.0)):
        # On a sphere E (b.u)^2 = |b|^2 / d: the mean slope is shared by all images, the rest is interaction.
        shared = gamma**2 * np.square(slopes.mean(0)).sum() / DIMENSION
        rest = gamma**2 * np.square(slopes - slopes.mean(0)).sum() / (SIZE - 1) / DIMENSION
        main = (0.5 * gamma**2) ** 2 * curvature.var(ddof=1)
        each = np.array([(p.single[index].directions, p.single[index].images, p.single[index].rest) for p in found])
        spread = each.std(axis=0, ddof=1) / np.sqrt(len(found))
        assert np.all(np.abs(each.mean(axis=0) - [shared, main, rest]) < 4 * spread), gamma
        assert each[:, 2].mean() == pytest.approx(rest, rel=0.1)
        paired = np.array([(p.paired[index].directions, p.paired[index].images, p.paired[index].rest) for p in found])
        assert paired[:, [0, 2]] == pytest.approx(0.0, abs=1e-12)  # no slope is left
        assert paired[:, 1].mean() == pytest.approx(main, rel=0.15)
        assert found[0].mean[index] == pytest.approx(0.5 * gamma**2 * 1.5, rel=0.2)


def test_a_pair_is_judged_by_the_rises_by_which_its_ends_are_judged():
    x = torch.randn(256, 4, generator=seeds.generator("inputs"))
    model = nn.Linear(3, 1).eval()
    targets = model(x[:, :3]).detach() + 0.1 * x[:, 3:]  # near a minimum: the rises along u and -u are nearly the same
    landscape = Landscape(model, [(x[:, :3], targets)], F.mse_loss)
    for seed in range(8):
        found = pilot_of(landscape, [0.3, 3.0], seed)
        for pair, single in zip(found.paired, found.single, strict=True):
            assert pair.of_draw(pilot.IMAGES) <= single.of_draw(pilot.IMAGES)  # the mean of two varies less than they


def test_its_draws_are_not_those_of_the_measurement(monkeypatch):
    _, landscape = images()
    drawn = []
    draw = perturbations.draw_direction
    monkeypatch.setattr(
        pilot, "draw_direction", lambda ls, seed, k, **given: drawn.append(k) or draw(ls, seed, k, **given)
    )
    pilot_of(landscape, [1.0])
    assert len(drawn) == len(set(drawn)) == 64 and max(drawn) < 0


@pytest.mark.parametrize("samples", [64, 80, 200, 1000])
def test_there_are_64_directions_at_least_and_the_price_is_known(samples):
    x = torch.zeros(samples, 3)
    model = nn.Linear(3, 1).eval()
    landscape = Landscape(model, [(x, x[:, :1])], lambda o, t: ((o - t) ** 2)[:, 0])
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = pilot_of(landscape, [1.0, 2.0])
    assert sum(seen) == pilot.price([landscape], 2, seed=0)
    assert len(seen) >= 64 * 4 and set(found.seconds) == set(pilot._sizes(landscape))


# --- plans, of made-up pilots

SECONDS = {16: 2.0, 32: 3.0, 64: 5.0, 128: 9.0, 256: 17.0}  # one for a visit, one for each 16 images
NONE = Components(0.0, 0.0, 0.0)


def planned(single, paired, *, alone=True, seconds=None, gathering=None, drawing=0.0, goal=None, samples=10_000):
    seconds = seconds or SECONDS
    gathering = gathering or dict.fromkeys(seconds, 0.0)
    found = Pilot([single], [paired], alone, np.array([1.0]), seconds, gathering, drawing)
    (plan,) = pilot.plan(found, np.array([1.0]), goal or Goal(0.1, 0.0), samples)
    return plan


def test_pairs_are_chosen_where_the_slope_dominates():
    assert planned(Components(5.0, 0.0, 100.0), Components(0.1, 0.0, 2.0)).paired
    assert not planned(Components(1.0, 0.0, 10.0), Components(0.9, 0.0, 9.0)).paired


def test_blocks_grow_with_the_interaction(monkeypatch):
    monkeypatch.setattr(pilot, "SLACK", 1.0)
    monkeypatch.setattr(pilot, "UNSURE", 0.0)
    sizes = [planned(Components(1.0, 0.0, rest), Components(1.0, 0.0, rest)).block_size for rest in (1, 100, 10_000)]
    # The work (V_A + V_E / n) (1 + n / 16) is least at n = 4 sqrt(V_E / V_A).
    assert sizes == [16, 32, 256]


def test_of_plans_that_take_about_as_long_the_one_with_the_fewest_images_is_taken(monkeypatch):
    monkeypatch.setattr(pilot, "UNSURE", 0.0)
    both = [Components(1.0, 0.0, 16.0)] * 2
    seconds = {8: 1.1, 16: 1.6, 32: 2.4}  # times 3, 2 and 1.5 draws: 3.3, 3.2 and 3.6
    assert planned(*both, seconds=seconds).block_size == 8
    seconds[8] = 1.2  # 3.6, more than 1.05 times the fastest
    assert planned(*both, seconds=seconds).block_size == 16
    seconds[8] = seconds[16] = 9.0
    assert planned(*both, seconds=seconds).block_size == 32


def test_directions_that_seem_to_vary_not_at_all_do_not_make_blocks_large(monkeypatch):
    both = [Components(0.0, 0.0, 6400.0)] * 2
    assert planned(*both).block_size == 32
    monkeypatch.setattr(pilot, "UNSURE", 0.0)
    monkeypatch.setattr(pilot, "SLACK", 1.0)
    assert planned(*both).block_size == 256


def test_small_blocks_need_as_many_images_to_know_their_spread():
    assert [settled(1, 10_000, size) for size in (4, 8, 16, 64, 0)] == [321, 161, 81, 81, 81]
    assert [settled(1, 50, size) for size in (4, 16)] == [370, 130]
    assert settled(1_000, 50, 4) == 1_000


def test_blocks_have_room_for_each_stratum_and_two_of_them_for_all_samples():
    x = torch.zeros(20, 3)
    of_one = Landscape(nn.Linear(3, 1).eval(), [(x, x[:, :1])], F.mse_loss)
    assert pilot._sizes(of_one) == [4, 8]
    many = Landscape(nn.Linear(3, 1).eval(), {str(k): [(x[:4], x[:4, :1])] for k in range(20)}, F.mse_loss)
    assert pilot._sizes(many) == [32]
    few = Landscape(nn.Linear(3, 1).eval(), {str(k): [(x[:4], x[:4, :1])] for k in range(5)}, F.mse_loss)
    assert pilot._sizes(few) == [8]


def test_dear_rays_make_larger_blocks():
    both = [Components(1.0, 0.0, 30.0)] * 2
    assert planned(*both).block_size < planned(*both, drawing=40.0).block_size


def test_radii_share_a_kind_where_directions_are_dear(monkeypatch):
    monkeypatch.setattr(pilot, "UNSURE", 0.0)
    few, many = Components(1.0, 0.0, 20.0), Components(1.0, 0.0, 2000.0)
    kinds = {}
    for drawing in (0.0, 40.0):
        found = Pilot([few, many], [few, many], True, np.ones(2), SECONDS, dict.fromkeys(SECONDS, 0.0), drawing)
        kinds[drawing] = [plan.block_size for plan in pilot.plan(found, np.array([1.0, 2.0]), Goal(0.1, 0.0), 10_000)]
    assert kinds[0.0][0] < kinds[0.0][1] and kinds[40.0][0] == kinds[40.0][1]


def test_visits_follow_from_the_variance():
    plan = planned(Components(1.0, 0.0, 16.0), Components(1.0, 0.0, 16.0), seconds={16: 1.0})
    assert plan.visits == pytest.approx(1.1 * 2.0 / 0.1**2, abs=1)
    assert planned(NONE, NONE).visits == 81  # fewer say too little of their own spread
    assert planned(NONE, NONE, seconds={64: 1.0}, samples=64).block_size == 0  # a block of all is the crossed design


def test_sampling_may_stop_short_of_a_round_where_images_count_as_sampled():
    found = [Components(1.0, 2.0, 14.0)] * 2
    many = planned(*found, seconds={16: 1.0}, samples=16_000)
    # V_A + V_E / 16 + V_B / 16 (1 - visits / 1,000) over the visits is the tolerance squared: no round of 1,000
    assert many.visits == pytest.approx(2.0 / (0.1**2 / 1.1 + 2 / 16 / 1000), abs=1)
    assert many.between == pytest.approx((2 / 16) / 2.0)
    pair = planned(*found, alone=False, seconds={16: 1.0}, samples=16_000)  # of a difference no share is known
    assert pair.visits == pytest.approx(1.1 * 2.0 / 0.1**2, abs=1) and pair.between == 0.0
    assert planned(*found, seconds={16: 1.0}, samples=3_200).visits == 280  # a round of 200, and 80 to know the spread


def test_what_is_not_finite_foresees_nothing():
    broken = Components(np.nan, np.nan, np.nan)
    assert planned(broken, broken).visits == 0


# --- automatic radii


@pytest.mark.slow
def test_automatic_radii_span_a_rise_of_a_hundredth_to_two():
    case = cases.make("conv_bn")
    with torch.no_grad():
        targets = case.model(case.inputs).argmax(1)  # what the network says already: near a minimum
    landscape = Landscape(case.model, [(case.inputs, targets)], nn.functional.cross_entropy)
    for normalisation in ("none", "filter", "layer", "parameter"):
        sampler = Sampler([landscape], 0, normalisation)
        radii = pilot.span(sampler)
        assert len(radii) == pilot.PLACES and np.all(np.diff(np.log(radii)) > 0)
        assert np.ptp(np.diff(np.log(radii))) < 1e-9
        first, last = sphere_flatness(landscape, radii[[0, -1]], num_samples=400, normalisation=normalisation).value
        assert 0.005 < first < 0.02 and 1.0 < last < 4.0, normalisation
