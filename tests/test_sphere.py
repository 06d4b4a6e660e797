"""Flatness on a sphere against closed forms, dense autograd and another library."""

import dataclasses
import warnings

import cases
import numpy as np
import pytest
import torch
from torch import nn

from flatlab import seeds
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.results import Cost, t_interval
from flatlab.metrics.sphere import (
    SphereFlatness,
    draw_ray,
    paired_difference,
    sample_rays,
    scale_filters,
    sphere_flatness,
)


def hessian(size, *names):
    """A symmetric matrix with eigenvalues of both signs."""
    matrix = torch.randn(size, size, generator=seeds.generator("test_sphere", *names), dtype=torch.float64)
    return matrix @ matrix.T / size - 0.2 * torch.eye(size, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ closed forms


def test_a_quadratic_loss_rises_by_its_trace():
    matrix, radii = hessian(30, "trace"), np.array([0.5, 1.0, 3.0])
    start = torch.ones(30, dtype=torch.float64) * 0.1
    landscape = cases.Quadratic(matrix, start, slope=-matrix @ start).landscape()
    flatness = sphere_flatness(landscape, radii, num_samples=300)
    expected = radii**2 * matrix.trace().item() / (2 * 30)
    assert np.all(np.abs(flatness.value - expected) < 3.5 * flatness.stderr)
    assert np.all(flatness.stderr < 0.1 * expected)


def test_an_isotropic_quadratic_rises_alike_in_each_direction():
    landscape = cases.Quadratic(3.0 * torch.eye(20, dtype=torch.float64)).landscape()
    flatness = sphere_flatness(landscape, [0.0, 0.5, 2.0], num_samples=5)
    assert flatness.draws == pytest.approx(np.tile([0.0, 0.375, 6.0], (5, 1)), rel=1e-6)
    assert not flatness.samples[:, 0].any()


def test_a_linear_loss_does_not_rise_on_average():
    zero = torch.zeros(20, 20, dtype=torch.float64)
    landscape = cases.Quadratic(zero, slope=torch.ones(20, dtype=torch.float64)).landscape()
    flatness = sphere_flatness(landscape, [1.0, 4.0], num_samples=400)
    assert np.all(np.abs(flatness.value) < 3.5 * flatness.stderr)
    assert flatness.draws.std(axis=0, ddof=1) == pytest.approx([1.0, 4.0], rel=0.15)  # gamma |b| / sqrt(n)


def at_a_minimum():
    """A smooth network that fits its targets exactly: no slope, and a Hessian without negative eigenvalues."""
    case = cases.make("conv_bn").double()
    case.model[2] = case.model[5] = nn.Tanh().eval()  # autograd does not see the curvature in the kinks of a ReLU
    with torch.no_grad():
        case.model[0].weight[2].zero_()
        return dataclasses.replace(case, targets=case.model(case.inputs), loss=nn.functional.mse_loss)


def test_the_filter_twin_rises_by_the_weighted_block_traces():
    case, rho = at_a_minimum(), 1e-3
    landscape = case.landscape([20, 4])
    dense, expected, start = case.dense_hessian(landscape.point), 0.0, 0
    for w in landscape.split(landscape.point):
        for row in w.flatten(1) if w.ndim > 1 else []:
            block = dense[start : start + len(row), start : start + len(row)]
            expected += 0.5 * rho**2 * (row.square().sum() * block.trace() / len(row)).item()
            start += len(row)
        start += w.numel() if w.ndim < 2 else 0
    flatness = sphere_flatness(landscape, [rho], num_samples=200, normalisation="filter")
    assert start == landscape.num_params
    assert abs(flatness.value[0] - expected) < 3.5 * flatness.stderr[0]
    assert flatness.stderr[0] < 0.1 * expected


def test_a_network_at_a_minimum_rises_by_its_trace():
    case, gammas = at_a_minimum(), np.array([1e-3, 1e-2])
    landscape = case.landscape([20, 4])
    flatness = sphere_flatness(landscape, gammas, num_samples=200)
    expected = gammas**2 * case.dense_hessian(landscape.point).trace().item() / (2 * landscape.num_params)
    assert np.all(np.abs(flatness.value - expected) < 3.5 * flatness.stderr)
    assert np.log10(flatness.value[1] / flatness.value[0]) == pytest.approx(2.0, abs=0.01)


def test_the_rise_at_small_radii_is_quadratic_at_a_minimum():
    matrix = hessian(10, "slope")
    flatness = sphere_flatness(cases.Quadratic(matrix).landscape(), [1e-3, 1e-2], num_samples=5)
    assert np.log10(flatness.value[1] / flatness.value[0]) == pytest.approx(2.0, abs=1e-6)


def test_the_rise_along_a_ray_of_a_network_is_its_taylor_series():
    case = cases.make("tied").double()
    landscape, gammas = case.landscape(), np.array([1e-3, 1e-2])
    ray = draw_ray(landscape, 0, 0)
    slope = (landscape.gradient() @ ray).item()
    rises = sample_rays(landscape, gammas, [0], seed=0)[0, :, 0] - gammas * slope
    assert np.log10(rises[1] / rises[0]) == pytest.approx(2.0, abs=0.05)
    assert rises[0] == pytest.approx(0.5 * gammas[0] ** 2 * (ray @ landscape.hvp(ray)).item(), rel=0.01)


def test_the_interval_covers_as_often_as_it_says():
    # The rises of a quadratic along 12 rays, 400 times; the loss is a closed form, so rays are all that costs.
    eigenvalues = np.linspace(0.1, 2.0, 40)
    truth, hits, repeats = eigenvalues.sum() / (2 * 40), 0, 400
    landscape = cases.Quadratic(torch.diag(torch.tensor(eigenvalues))).landscape(check=False)
    for seed in range(repeats):
        rays = [draw_ray(landscape, seed, k).numpy() for k in range(12)]
        rises = np.array([0.5 * (eigenvalues * ray**2).sum() for ray in rays])[:, None, None]
        low, high = SphereFlatness.from_samples(landscape, 1.0, rises, seed=seed).interval(0.95)
        hits += int(low[0] <= truth <= high[0])
    assert abs(hits - 0.95 * repeats) < 3.5 * np.sqrt(0.95 * 0.05 * repeats)


def test_the_interval_is_students():
    low, high = t_interval(np.array([1.0]), np.array([0.5]), count=2, level=0.5)
    assert (low, high) == (pytest.approx(0.5), pytest.approx(1.5))  # with one degree of freedom, t(0.75) = 1
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        t_interval(low, high, count=2, level=95)


@pytest.mark.oracle
def test_small_spheres_agree_with_the_trace_of_pyhessian():
    case = cases.make("mlp").double()
    landscape, gamma = case.landscape([5, 1, 11, 7]), 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyhessian

        oracle = pyhessian.hessian(case.model, case.loss, data=(case.inputs, case.targets), cuda=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # it draws from the global generator
            probes = np.array(oracle.trace(maxIter=400, tol=-np.inf))  # tol=0 stops as soon as a mean is negative
    case.model.zero_grad()
    slope = landscape.gradient()
    rises = sample_rays(landscape, gamma, range(400), seed=0)[:, 0, 0]
    rises -= gamma * np.array([(slope @ draw_ray(landscape, 0, k)).item() for k in range(400)])
    traces = rises * 2 * landscape.num_params / gamma**2
    spread = np.hypot(probes.std(ddof=1), traces.std(ddof=1)) / np.sqrt(400)
    assert abs(traces.mean() - probes.mean()) < 3.5 * spread
    assert spread < 0.2 * probes.mean()


# --------------------------------------------------------------------------------------------------------- rays


@pytest.mark.parametrize("name", cases.MODELS)
def test_a_point_lies_at_its_radius(name):
    landscape = cases.make(name).landscape()
    ray = draw_ray(landscape, 3, 1)
    for gamma in (0.1, 1.0, 10.0):
        moved = torch.add(landscape.point, ray, alpha=gamma).double() - landscape.point.double()
        assert moved.norm().item() == pytest.approx(gamma, rel=1e-5)


def test_a_filter_ray_is_as_long_as_each_filter():
    case = cases.make("conv_bn")
    with torch.no_grad():
        case.model[0].weight[2].zero_()
    landscape = case.landscape()
    ray = draw_ray(landscape, 0, 0, normalisation="filter")
    for z, w in zip(landscape.split(ray), landscape.split(landscape.point), strict=True):
        if w.ndim > 1:
            torch.testing.assert_close(z.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1))
        else:
            assert not z.any()
    flatness = sphere_flatness(landscape, [0.5], num_samples=2, normalisation="filter")
    assert 0.5 * ray.norm().item() == pytest.approx(flatness.relative_radii[0] * flatness.norm, rel=1e-5)


def test_rescaling_a_filter_leaves_the_twin_unchanged_but_not_the_sphere():
    values = {}
    for scale in (1.0, 0.1):
        case = cases.make("conv_bn").double()
        bn = case.model[1]
        with torch.no_grad():
            case.model[0].weight.mul_(scale), case.model[0].bias.mul_(scale)
            bn.running_mean.mul_(scale), bn.running_var.add_(bn.eps).mul_(scale**2).sub_(bn.eps)
        for kind in ("none", "filter"):
            values[scale, kind] = sphere_flatness(case.landscape(), [0.3], num_samples=4, normalisation=kind).value
    assert values[1.0, "filter"] == pytest.approx(values[0.1, "filter"], rel=1e-6)
    assert values[1.0, "none"] != pytest.approx(values[0.1, "none"], rel=0.05)


def test_rays_depend_on_the_seed_and_their_number_alone():
    landscape, other = cases.make("mlp").landscape(), cases.make("mlp").double().landscape()
    ten = sample_rays(landscape, [1.0], range(10), seed=7)
    assert np.array_equal(ten[:5], sample_rays(landscape, [1.0], range(5), seed=7))
    assert np.array_equal(ten[[8, 2]], sample_rays(landscape, [1.0], [8, 2], seed=7))
    assert not np.isclose(ten, sample_rays(landscape, [1.0], range(10), seed=8)).any()
    ray = draw_ray(landscape, 7, 3)
    assert torch.equal(ray.double(), draw_ray(other, 7, 3))
    moved = cases.make("mlp")
    with torch.no_grad():
        moved.model[0].weight.mul_(3.0)
    assert torch.equal(ray, draw_ray(moved.landscape(), 7, 3))


def test_a_generator_gives_one_seed():
    landscape = cases.make("mlp").landscape()
    first = sphere_flatness(landscape, [1.0], num_samples=3, seed=seeds.generator("g"))
    again = sphere_flatness(landscape, [1.0], num_samples=3, seed=first.seed)
    assert np.array_equal(first.samples, again.samples)
    assert first.seed == seeds.base_seed(seeds.generator("g"))


# ------------------------------------------------------------------------------------------------------ results


@pytest.mark.parametrize("normalisation", ["none", "filter"])
@pytest.mark.parametrize(("name", "cut"), [(name, cut) for name in cases.MODELS for cut in cases.CUTS])
def test_every_case_is_measured_and_left_untouched(name, cut, normalisation, untouched):
    case = cases.make(name)
    with untouched(case.model):
        flatness = sphere_flatness(
            case.landscape(cases.CUTS[cut]), [0.0, 0.5], num_samples=3, normalisation=normalisation
        )
        whole = sphere_flatness(case.landscape(), [0.0, 0.5], num_samples=3, normalisation=normalisation)
    assert flatness.samples == pytest.approx(whole.samples, rel=1e-4, abs=1e-6)
    assert flatness.value[0] == 0.0 and flatness.value[1] != 0.0
    assert flatness.cost.forward_passes == 4 and flatness.cost.images == 4 * 24


def stratified(num_samples=6, seed=0):
    case = cases.make("mlp")
    batches = case.batches([3, 9, 12])
    landscape = Landscape(case.model, {"a": batches[:1], "b": batches[1:2], "c": batches[2:]}, case.loss)
    return sphere_flatness(landscape, [0.5, 1.0], num_samples=num_samples, seed=seed)


def test_strata_weigh_equally_and_can_be_chosen():
    flatness = stratified()
    assert flatness.samples.shape == (6, 2, 3)
    assert flatness.value == pytest.approx(flatness.samples.mean(axis=(0, 2)))
    sources = flatness.of(["c", "a"])
    assert sources.strata == ("c", "a")
    assert sources.value == pytest.approx(flatness.samples[:, :, [2, 0]].mean(axis=(0, 2)))
    assert flatness.of("b").base_loss == flatness.base_loss[1]
    with pytest.raises(UserError, match="Unknown stratum 'd'; known: a, b, c"):
        flatness.of(["a", "d"])
    with pytest.raises(UserError, match="No stratum was named"):
        flatness.of([])


def test_blocks_assemble_to_the_whole():
    case, done = cases.make("mlp"), []
    landscape = case.landscape()
    whole = sphere_flatness(landscape, [0.5], num_samples=5, seed=1, report=lambda *now: done.append(now))
    blocks = [sample_rays(landscape, [0.5], rays, seed=1) for rays in (range(3, 5), range(3))]
    parts = SphereFlatness.from_samples(landscape, [0.5], np.concatenate(blocks[::-1]), seed=1)
    assert np.array_equal(parts.samples, whole.samples) and parts.cost.images == whole.cost.images
    assert done == [(k, 5) for k in range(1, 6)]
    with pytest.raises(UserError, match=r"shape \(K >= 2, 1, 1\)"):
        SphereFlatness.from_samples(landscape, [0.5], blocks[0][:1], seed=1)


def test_a_result_speaks_in_tables_and_pictures():
    flatness = stratified()
    frame = flatness.to_frame()
    assert list(frame.columns) == ["radius", "value", "stderr", "low", "high", "over"]
    assert frame["over"].tolist() == ["directions"] * 2
    low, high = flatness.interval(0.5)
    assert np.all(frame["low"] < low) and np.all(high < frame["high"])
    axes = flatness.plot()
    assert "nats" in axes.get_ylabel() and len(axes.lines) == 1 and len(axes.collections) == 1
    assert flatness.plot(axes) is axes
    assert flatness.converged and flatness.space == "weights"
    assert flatness.relative_radii == pytest.approx(flatness.radii / flatness.norm)
    assert flatness.rms == pytest.approx(flatness.radii / np.sqrt(53))
    with pytest.raises(dataclasses.FrozenInstanceError):
        flatness.seed = 1


def test_infinite_losses_stay_infinite():
    x = torch.ones(2, 1)
    landscape = Landscape(nn.Linear(1, 1, bias=False).eval(), [(x, x)], lambda o, t: o[:, 0].exp())
    flatness = sphere_flatness(landscape, [0.1, 1e4], num_samples=8)
    assert np.isfinite(flatness.value[0]) and flatness.value[1] == np.inf and np.isnan(flatness.stderr[1])
    assert flatness.nonfinite_share == np.isinf(flatness.samples[:, 1]).mean() / 2 > 0


def test_pairs_share_their_rays():
    case, other = cases.make("mlp"), cases.make("mlp")
    with torch.no_grad():
        other.model[2].weight.mul_(1.1)
    a, b = (sphere_flatness(each.landscape(), [0.5, 1.0], num_samples=20) for each in (case, other))
    pair = paired_difference(a, b)
    assert pair.value == pytest.approx(a.value - b.value)
    assert np.all(pair.stderr < 0.5 * np.hypot(a.stderr, b.stderr))
    assert pair.cost == a.cost + b.cost and pair.to_frame().shape == (2, 6)


def test_pairs_without_common_rays_are_refused():
    a = stratified()
    assert paired_difference(a, a.of("a")).value == pytest.approx(a.value - a.of("a").value)
    for change in ({"seed": 1}, {"normalisation": "filter"}, {"num_params": 3}, {"radii": a.radii * 2}):
        with pytest.raises(UserError, match=f"but {next(iter(change))} differs"):
            paired_difference(a, dataclasses.replace(a, **change))
    with pytest.raises(UserError, match=r"but num_samples differs \(6 and 4\)"):
        paired_difference(a, stratified(4))


@pytest.mark.parametrize("radii", [[], [-1.0], [np.nan], [np.inf], [[1.0]]])
def test_radii_that_are_none_are_refused(radii):
    with pytest.raises(UserError, match="radii must be finite numbers of at least 0"):
        sphere_flatness(cases.make("mlp").landscape(), radii, num_samples=2)


def test_requests_without_meaning_are_refused():
    landscape = cases.make("mlp").landscape()
    with pytest.raises(UserError, match="num_samples must be at least 2"):
        sphere_flatness(landscape, [1.0], num_samples=1)
    with pytest.raises(UserError, match="Unknown normalisation 'layer'; known: none, filter"):
        sphere_flatness(landscape, [1.0], normalisation="layer")
    with pytest.raises(UserError, match="the landscape has none"):
        sphere_flatness(cases.make("mlp").landscape(params="*.bias"), [1.0], normalisation="filter")


def test_an_exception_in_a_measurement_restores_the_model(untouched):
    case = cases.make("conv_bn_channels_last")
    landscape = case.landscape()

    def report(done, total):
        raise InterruptedError

    with untouched(case.model), pytest.raises(InterruptedError):
        sphere_flatness(landscape, [5.0], report=report)


def test_costs_add_up():
    assert Cost(1.0, 10) + Cost(0.5, 5, 2, 3.0) == Cost(1.5, 15, 2, 3.0)


def test_scaling_takes_any_vector():
    landscape = cases.make("mlp").landscape()
    point = landscape.point
    scaled = scale_filters(2.0 * point, landscape)
    torch.testing.assert_close(landscape.split(scaled)[0], landscape.split(point)[0])
