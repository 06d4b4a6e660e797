"""Comparisons of two models along common rays."""

import dataclasses

import cases
import numpy as np
import pytest
import torch

from flatlab import load, seeds
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness import sphere
from flatlab.metrics.flatness.compare import compare_flatness, paired_difference
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.slope import price
from flatlab.metrics.flatness.sphere import sphere_flatness


def test_pairs_share_their_rays():
    case, other = cases.make("mlp"), cases.make("mlp")
    with torch.no_grad():
        other.model[2].weight.mul_(1.1)
    a, b = (sphere_flatness(each.landscape(), [0.5, 1.0], num_samples=20) for each in (case, other))
    pair = paired_difference(a, b)
    assert pair.value == pytest.approx(a.value - b.value)
    assert np.all(pair.stderr < 0.5 * np.hypot(a.stderr, b.stderr))
    assert pair.cost == a.cost + b.cost and pair.to_frame().shape == (2, 7)


def test_pairs_without_common_rays_are_refused():
    a = cases.stratified()
    assert paired_difference(a, a.of("a")).value == pytest.approx(a.value - a.of("a").value)
    for change in (
        {"seed": 1},
        {"device": "cuda"},
        {"normalisation": "filter"},
        {"num_params": 3},
        {"radii": a.radii * 2},
    ):
        with pytest.raises(UserError, match=f"but {next(iter(change))} differs"):
            paired_difference(a, dataclasses.replace(a, **change))
    with pytest.raises(UserError, match=r"numbers of draws, got \[6, 6\] and \[4, 4\]"):
        paired_difference(a, cases.stratified(4))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_file_knows_where_its_directions_were_drawn(device, tmp_path):
    result = dataclasses.replace(cases.stratified(), device=device)
    result.save(tmp_path / "flatness")
    assert load(tmp_path / "flatness").device == device


def two(shift=0.05):
    """Two networks close to each other, on the same data."""
    a, b = cases.network(), cases.network()
    with torch.no_grad():
        noise = torch.randn(b.num_params, generator=seeds.generator("two"), dtype=torch.float64)
        b._put(b.point + shift * noise)
    return a, cases.softmax(model=b.model)


def test_a_model_is_as_flat_as_itself():
    a, b = two(0.0)
    for given in ({"num_samples": 5}, {"rel_error": 0.2}):
        pair = compare_flatness(a, b, [0.0, 0.5, 2.0], **given)
        assert not pair.value.any() and not pair.stderr.any() and not np.concatenate(pair.raw).any()
        assert pair.verdict("A", "B") == "not distinguishable at all radii measured"
        assert pair.converged
    exact = paired_difference(*[sphere_flatness(a, [2.0], num_samples=100)] * 2)
    assert np.ravel(exact.ratio()) == pytest.approx([1.0, 1.0, 1.0], rel=1e-12)


def test_a_comparison_is_the_difference_of_two_measurements():
    a, b = two()
    pair = compare_flatness(a, b, [0.5, 2.0], num_samples=30, seed=4)
    apart = paired_difference(*(sphere_flatness(each, [0.5, 2.0], num_samples=30, seed=4) for each in (a, b)))
    assert pair.value == pytest.approx(apart.value) and pair.stderr == pytest.approx(apart.stderr)
    assert pair.cost.images == apart.cost.images == 2 * (61 * 96 + price(a, seed=4))
    assert np.all(pair.stderr < 0.6 * np.hypot(pair.a.stderr, pair.b.stderr))


def test_a_comparison_stops_at_the_accuracy_of_the_difference():
    a, b = two()
    truth = compare_flatness(a, b, [0.5, 2.0], num_samples=1500, seed=1)
    pair = compare_flatness(a, b, [0.5, 2.0], rel_error=0.03, seed=2)
    assert pair.converged and pair.a.stopped == ("accuracy", "accuracy")
    largest = np.maximum(np.abs(pair.a.value), np.abs(pair.b.value))
    assert np.all(pair.stderr <= 0.03 * largest)
    assert np.all(np.abs(pair.value - truth.value) < 3.5 * np.hypot(pair.stderr, truth.stderr))
    assert pair.to_frame()["over"].tolist() == ["directions"] * 2


def test_the_cut_into_batches_need_not_be_the_same():
    a, b = two()
    other = cases.softmax(model=b.model, cut=(96,))
    joint = Sampler([a, other], 0, "none", value=lambda rises: rises[0] - rises[1])
    apart = [cases.in_blocks(each, [1.0], 8, errors=(0.3, 0.3)) for each in (a, b)]
    found = sphere.sample(joint, [1.0], None, (0.3, 0.3), None, block_size=8)
    for left, right in zip(found, apart, strict=True):
        count = min(len(left.visits[0]), len(right.visits[0]))
        assert left.visits[0][:count] == pytest.approx(right.visits[0][:count], rel=1e-9)


def test_the_ratio_s_interval_covers():
    """Measurements made up of skewed draws with a known ratio of 2: the delta method's interval."""
    a = cases.stratified()
    rng, hits, repeats = np.random.default_rng(0), 0, 2000
    for _ in range(repeats):
        shared, own = rng.chisquare(4, size=(60, 1)), rng.chisquare(4, size=(60, 1))
        one, two_ = (
            dataclasses.replace(a, radii=a.radii[:1], visits=(v,), blocks=(10,), plans=a.plans[:1], strata=("all",))
            for v in (shared + own, shared)
        )
        value, low, high = paired_difference(one, two_).ratio()
        hits += int(low[0] <= 2.0 <= high[0])
    assert 0.93 <= hits / repeats <= 0.965


def test_a_ratio_to_what_may_be_zero_is_none():
    a = cases.stratified()
    flat = dataclasses.replace(a, visits=tuple(v - v.mean() for v in a.visits))
    assert np.isnan(paired_difference(a, flat).ratio()).all()


SENTENCES = {
    (-1, -1): "A is flatter at all radii measured",
    (1, 1): "B is flatter at all radii measured",
    (0, 0): "not distinguishable at all radii measured",
    (-1, 0): "A is flatter up to radius 1; not distinguishable from radius 2 on",
    (0, 1): "not distinguishable up to radius 1; B is flatter from radius 2 on",
    (-1, 1): "A is flatter up to radius 1; B is flatter from radius 2 on",
    (-1, 0, 0, 1): "A is flatter up to radius 1; not distinguishable from 2 to 3; B is flatter from radius 4 on",
}


@pytest.mark.parametrize(("signs", "sentence"), SENTENCES.items())
def test_the_verdict_is_a_sentence(signs, sentence):
    a = cases.stratified()
    visits = tuple(np.array([[s - 0.01], [s + 0.01], [s - 0.005], [s + 0.005]]) for s in (0, *signs))
    radii = np.arange(len(visits), dtype=float)
    count = {"radii": radii, "plans": a.plans[:1] * len(radii), "blocks": (1,) * len(radii), "strata": ("all",)}
    one = dataclasses.replace(a, visits=visits, **count)
    two_ = dataclasses.replace(a, visits=tuple(v * 0 for v in visits), **count)
    assert paired_difference(one, two_).verdict("A", "B") == sentence


def test_what_cannot_be_compared_is_refused():
    a, b = two()
    with pytest.raises(UserError, match=r"models of one architecture, but .* \(83 and 21 numbers\)"):
        compare_flatness(a, cases.softmax(), [1.0])
    with pytest.raises(UserError, match=r"have different samples \(96 and 90\)"):
        compare_flatness(a, cases.softmax(90, model=b.model, cut=(90,)), [1.0])
    inputs, targets = b._batches[0][0][:2]
    other = [(inputs + 1e-3, targets), *[batch[:2] for batch in b._batches[0][1:]]]
    with pytest.raises(UserError, match=r"have different samples \(though equally many, 96\)"):
        compare_flatness(a, Landscape(b.model, other, torch.nn.functional.cross_entropy), [1.0])
    plain = sphere_flatness(a, [1.0], num_samples=4)
    turned = dataclasses.replace(plain, plans=(dataclasses.replace(plain.plans[0], paired=True),))
    with pytest.raises(UserError, match="but paired differs"):
        paired_difference(plain, turned)


def test_the_losses_must_be_one_function():
    model, x = torch.nn.Linear(4, 3).eval(), torch.randn(16, 4)
    targets = torch.arange(16) % 3
    losses = [torch.nn.functional.cross_entropy, lambda o, t: torch.nn.functional.cross_entropy(o, t)]
    losses.append(lambda o, t: 10 * losses[0](o, t))
    plain, same, tenfold = (Landscape(model, [(x, targets)], loss) for loss in losses)
    assert compare_flatness(plain, same, [1.0], num_samples=4).value == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(UserError, match="one loss function"):
        compare_flatness(plain, tenfold, [1.0], num_samples=4)
