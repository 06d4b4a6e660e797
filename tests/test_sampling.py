"""The sampler is unbiased whatever the blocks, and hides neither costs nor what is not finite."""

import dataclasses

import cases
import numpy as np
import pytest
import torch
from cases import in_blocks, network, softmax
from torch import nn

from flatlab import seeds
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics import units as metrics_units
from flatlab.metrics.flatness import sphere
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.results.estimate import mean_of

# --- unbiased


@pytest.mark.parametrize("make", [softmax, network], ids=["softmax", "network"])
def test_block_sizes_agree_with_the_crossed_design(make):
    landscape = make()
    truth = sphere_flatness(landscape, [0.5, 2.0], num_samples=1000, seed=1)
    for size in (4, 8, 16, 96):
        found = in_blocks(landscape, [0.5, 2.0], size, errors=(0.06, 0.0), seed=2, budget=1e6)
        assert found.stopped == ("accuracy", "accuracy") and found.blocks == (96 // size,) * 2
        assert np.all(found.stderr <= 0.06 * found.value)
        assert np.all(np.abs(found.value - truth.value) < 3.5 * np.hypot(found.stderr, truth.stderr)), size


def test_an_accuracy_is_what_is_reached():
    landscape = softmax()
    truth = sphere_flatness(landscape, [0.3, 3.0], num_samples=1500, seed=1)
    found = sphere_flatness(landscape, [0.3, 0.0, 3.0], rel_error=0.03, seed=3)
    assert found.converged and set(found.stopped) == {"accuracy", "samples"}
    assert found.value[1] == found.stderr[1] == 0.0
    assert np.all(found.stderr[[0, 2]] <= np.maximum(0.03 * found.value[[0, 2]], 1e-4))
    assert np.all(np.abs(found.value[[0, 2]] - truth.value) < 3.5 * np.hypot(found.stderr[[0, 2]], truth.stderr))


def test_strata_and_blocks_that_lack_one_are_unbiased():
    case = cases.make("mlp").double()
    pairs = case.batches([3, 9, 12])
    landscape = Landscape(case.model, {"a": pairs[:1], "b": pairs[1:2], "c": pairs[2:]}, case.loss)
    truth = sphere_flatness(landscape, [1.0], num_samples=400, seed=1)
    found = in_blocks(landscape, [1.0], 3, errors=(0.1, 0.0), budget=1e6)
    for a, b in ((found, truth), (found.of("a"), truth.of("a"))):
        assert abs(a.value[0] - b.value[0]) < 3.5 * np.hypot(a.stderr[0], b.stderr[0])


def test_the_share_between_images_is_that_of_all_strata_alone():
    found = cases.stratified()
    plan = dataclasses.replace(found.plans[0], between=0.5)
    rises = np.random.default_rng(0).normal(size=(5, len(found.strata)))
    part = dataclasses.replace(found, radii=found.radii[:1], visits=(rises,), blocks=(10,), plans=(plan,))
    assert part.stderr == pytest.approx(mean_of(rises.mean(axis=1)).stderr * np.sqrt(1 - 0.5 * 5 / 10))
    assert part.of("a").stderr == pytest.approx(mean_of(rises[:, part.strata.index("a")]).stderr)


def test_num_samples_is_an_independent_loop_and_costs_what_it_says():
    landscape = network()
    for normalisation in ("none", "filter", "layer", "parameter"):
        found = sphere_flatness(landscape, [0.0, 0.5, 1.5], num_samples=4, seed=5, normalisation=normalisation)
        alone = cases.walked(landscape, [0.0, 0.5, 1.5], range(4), seed=5, normalisation=normalisation)
        assert found.samples == pytest.approx(alone, rel=1e-9, abs=1e-12)
        assert found.value == pytest.approx(alone.mean(axis=(0, 2)), abs=1e-12)
        assert found.stderr == pytest.approx(alone[:, :, 0].std(axis=0, ddof=1) / 2, abs=1e-12)
        assert (found.cost.images, found.cost.forward_passes) == (9 * 96, 9)
        assert found.stopped == ("samples",) * 3 and found.converged


def forwarded(landscape):
    """Count the images that go through a landscape's model."""
    seen = []
    landscape.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("radii", ["auto", [0.0, 0.5, 2.0]])
def test_what_is_said_to_be_spent_is_what_was_forwarded(radii):
    landscape = softmax()
    seen = forwarded(landscape)
    found = sphere_flatness(landscape, radii, rel_error=0.1)
    whole = landscape.num_samples if 1 in found.blocks else 0  # the base loss, which was known
    assert found.cost.images in (sum(seen), sum(seen) + whole)


# --- pairs, rays and seeds


def linear():
    """A loss that is linear, with a slope of its own for each image."""
    rng = seeds.generator("linear")
    model = nn.Linear(5, 1, bias=False).double().eval()
    x = torch.randn(64, 5, generator=rng, dtype=torch.float64)
    return Landscape(model, [(x, torch.zeros(64))], lambda outputs, targets: outputs[:, 0])


def test_pairs_cancel_a_linear_loss():
    found = in_blocks(linear(), [1.0, 3.0], 8)
    assert np.concatenate(found.visits) == pytest.approx(0.0, abs=1e-13) and found.paired == (True, True)
    assert found.stopped == ("accuracy", "accuracy")
    assert np.abs(sphere_flatness(linear(), [1.0], num_samples=5).samples).min() > 1e-3


def test_radii_of_one_plan_share_rays_and_seeds_name_them():
    landscape = softmax()
    asked = (([1, 2], 0), ([2], 0), ([2], 1))
    both, alone, other = (in_blocks(landscape, radii, 8, errors=(0.2, 0), seed=seed) for radii, seed in asked)
    count = min(len(both.visits[1]), len(alone.visits[0]))
    assert np.array_equal(both.visits[1][:count], alone.visits[0][:count])
    assert not np.isclose(alone.visits[0][:16], other.visits[0][:16]).any()
    drawn = in_blocks(landscape, [2], 8, errors=(0.2, 0), seed=both.seed)
    assert np.array_equal(drawn.visits[0], alone.visits[0])


def test_a_block_size_leaves_nothing_to_timings(monkeypatch):
    first = in_blocks(network(), [0.5, 2.0], 8, errors=(0.1, 0))
    monkeypatch.setattr("flatlab.metrics.flatness.pilot.run_pilot", None)
    again = in_blocks(network(), [0.5, 2.0], 8, errors=(0.1, 0))
    assert all(np.array_equal(a, b) for a, b in zip(first.visits, again.visits, strict=True))
    assert first.cost.images == again.cost.images and first.stopped == again.stopped


def test_the_cut_into_batches_leaves_a_measurement_alone():
    first, again = (in_blocks(softmax(cut=cut), [1.0], 8) for cut in ((96,), (7, 80, 9)))
    assert first.visits[0] == pytest.approx(again.visits[0], rel=1e-9)


# --- what goes wrong


class Limited(nn.Module):
    """Is interrupted at its n-th call."""

    def __init__(self, inner, calls=10**9):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.inner(x)


@pytest.mark.parametrize("num_samples", [None, 50])
def test_interrupted_it_says_what_it_has(num_samples, untouched):
    model = Limited(nn.Linear(6, 3))
    landscape = softmax(model=model)
    calls = 128 + 60 if num_samples else 8000  # the slopes take 128
    if num_samples is None:
        model.calls = 10**9
        sphere_flatness(landscape, [0.5, 1.0], rel_error=0.2)
    with untouched(model):
        model.calls = calls
        found = sphere_flatness(landscape, [0.5, 1.0], rel_error=1e-3, num_samples=num_samples, budget=1e8)
    assert set(found.stopped) == {"interrupted"} and not found.converged
    assert np.isfinite(found.interval()).all() and min(map(len, found.visits)) >= 8
    model.calls = 10**9
    assert np.isfinite(landscape.evaluate().loss)


class Slope(nn.Linear):
    def __init__(self):
        super().__init__(2, 1, bias=False)
        nn.init.ones_(self.weight)


def test_infinite_rises_end_a_radius_and_are_reported():
    x = torch.ones(96, 2)
    landscape = Landscape(Slope().eval(), [(x, x)], lambda o, t: o[:, 0].exp())
    found = in_blocks(landscape, [0.1, 1e4], 8, errors=(0.1, 0), budget=1e6)
    assert found.stopped == ("accuracy", "nonfinite") and not found.converged
    assert found.value[1] == np.inf and np.isnan(found.stderr[1]) and len(found.visits[1]) == 180  # the first look
    assert 0.0 < found.nonfinite_share < 1.0
    piloted = sphere_flatness(landscape, [0.1, 1e4], rel_error=0.1, budget=1e6)
    assert piloted.stopped == ("accuracy", "nonfinite") and piloted.value[1] == np.inf


def test_small_data_and_large_blocks_are_crossed():
    few = cases.make("mlp").landscape()
    found = sphere_flatness(few, [0.5], rel_error=0.2, budget=1e6)
    assert found.blocks == (1,) and found.samples.shape[0] >= 32 and found.stopped == ("accuracy",)
    assert {in_blocks(few, [0.5], size, errors=(0.2, 0), budget=1e6).blocks for size in (24, 100)} == {(1,)}
    one = Landscape(
        nn.Linear(2, 2).eval(), [(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))], nn.functional.cross_entropy
    )
    assert sphere_flatness(one, [0.5], rel_error=0.3, budget=1e5).converged


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rel_error": -1}, "rel_error must be a finite number >= 0, got -1"),
        ({"rel_error": 0, "abs_error": 0}, "rel_error and abs_error must not both be 0"),
        ({"budget": 0}, "budget must be a finite number > 0, got 0"),
        ({"num_samples": 1}, "num_samples must be an integer >= 2, got 1"),
        ({"radii": "best"}, "must be numbers or"),
    ],
)
def test_goals_that_are_none_are_refused(given, sentence):
    with pytest.raises(UserError, match=sentence):
        sphere_flatness(softmax(), **{"radii": [1.0], **given})


@pytest.mark.slow
def test_units_name_all_that_decides_them():
    names = []

    def keep(units):
        names.extend(name for name, _ in units if not name.startswith("slopes"))  # they rest on the least radius
        return metrics_units.forget(units)

    for radii in ([1.0], [1.0000001], [2.0], [1.0, 2.0], list(np.linspace(0.1, 1, 200))):
        sampler = Sampler([softmax()], 0, "none", keep=keep)
        sphere.sample(sampler, radii, None, (0.5, 0.5), None, block_size=8)
    assert len(set(names)) == len(names) and max(map(len, names)) < 60
