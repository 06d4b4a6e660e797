"""Flatness on a sphere, in the crossed design: closed forms, dense autograd, another library, an independent loop."""

import dataclasses

import cases
import numpy as np
import pytest
import torch
from torch import nn

from flatlab import seeds
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.results.estimate import Cost, Estimate, mean_of


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
    assert flatness.samples[:, :, 0] == pytest.approx(np.tile([0.0, 0.375, 6.0], (5, 1)), rel=1e-6)
    assert not flatness.samples[:, 0].any()


def test_a_linear_loss_does_not_rise_on_average():
    zero = torch.zeros(20, 20, dtype=torch.float64)
    landscape = cases.Quadratic(zero, slope=torch.ones(20, dtype=torch.float64)).landscape()
    flatness = sphere_flatness(landscape, [1.0, 4.0], num_samples=400)
    assert np.all(np.abs(flatness.value) < 3.5 * flatness.stderr)
    assert flatness.samples.std(axis=0, ddof=1)[:, 0] == pytest.approx([1.0, 4.0], rel=0.15)  # gamma |b| / sqrt(n)


def test_a_network_at_a_minimum_rises_by_its_trace():
    case, gammas = cases.at_a_minimum(), np.array([1e-3, 1e-2])
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
    ray = draw_direction(landscape, 0, 0)
    slope = (landscape.gradient() @ ray).item()
    rises = cases.walked(landscape, gammas, [0])[0, :, 0] - gammas * slope
    assert np.log10(rises[1] / rises[0]) == pytest.approx(2.0, abs=0.05)
    assert rises[0] == pytest.approx(0.5 * gammas[0] ** 2 * (ray @ landscape.hvp(ray)).item(), rel=0.01)


def test_the_interval_covers_as_often_as_it_says():
    # The rises of a quadratic along 12 rays, 400 times; the loss is a closed form, so rays are all that costs.
    eigenvalues = np.linspace(0.1, 2.0, 40)
    truth, hits, repeats = eigenvalues.sum() / (2 * 40), 0, 400
    landscape = cases.Quadratic(torch.diag(torch.tensor(eigenvalues))).landscape(check=False)
    for seed in range(repeats):
        rays = [draw_direction(landscape, seed, k).numpy() for k in range(12)]
        found = mean_of(np.array([0.5 * (eigenvalues * ray**2).sum() for ray in rays]))
        hits += int(abs(found.value - truth) <= found.half_width(0.95))
    assert abs(hits - 0.95 * repeats) < 3.5 * np.sqrt(0.95 * 0.05 * repeats)


def test_the_interval_is_students():
    assert Estimate(1.0, 0.5, 1).half_width(0.5) == pytest.approx(0.5)  # with one degree of freedom, t(0.75) = 1
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        Estimate(1.0, 0.5, 1).half_width(95)


@pytest.mark.oracle
def test_small_spheres_agree_with_the_trace_of_pyhessian():
    case = cases.make("mlp").double()
    landscape, gamma = case.landscape([5, 1, 11, 7]), 1e-3
    theirs = np.array(cases.by_pyhessian(case, "trace", maxIter=400, tol=-np.inf))  # tol 0 ends at a negative mean
    slope = landscape.gradient()
    rises = cases.walked(landscape, [gamma], range(400))[:, 0, 0]
    rises -= gamma * np.array([(slope @ draw_direction(landscape, 0, k)).item() for k in range(400)])
    traces = rises * 2 * landscape.num_params / gamma**2
    spread = np.hypot(theirs.std(ddof=1), traces.std(ddof=1)) / np.sqrt(400)
    assert abs(traces.mean() - theirs.mean()) < 3.5 * spread
    assert spread < 0.2 * theirs.mean()


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


def test_strata_weigh_equally_and_can_be_chosen():
    flatness = cases.stratified()
    assert flatness.samples.shape == (6, 2, 3)
    assert flatness.value == pytest.approx(flatness.samples.mean(axis=(0, 2)))
    sources = flatness.of(["c", "a"])
    assert sources.strata == ("c", "a")
    assert sources.value == pytest.approx(flatness.samples[:, :, [2, 0]].mean(axis=(0, 2)))
    assert flatness.of("b").base_loss == flatness.base_loss[1]
    with pytest.raises(UserError, match="Unknown stratum 'd'.*: a, b, c"):
        flatness.of(["a", "d"])
    with pytest.raises(UserError, match="At least one stratum must be given"):
        flatness.of([])


def test_a_result_has_tables_and_pictures():
    flatness = cases.stratified()
    frame = flatness.to_frame()
    assert list(frame.columns) == ["radius", "value", "stderr", "low", "high", "over", "reached"]
    assert frame["over"].tolist() == ["directions"] * 2
    low, high = flatness.interval(0.5)
    assert np.all(frame["low"] < low) and np.all(high < frame["high"])
    axes = flatness.plot()
    assert "nats" in axes.get_ylabel() and len(axes.lines) == 1 and len(axes.collections) == 1
    assert flatness.plot(axes) is axes
    assert flatness.converged and flatness.slopes is None
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


@pytest.mark.parametrize("radii", [[], [-1.0], [np.nan], [np.inf], [[1.0]]])
def test_radii_that_are_none_are_refused(radii):
    with pytest.raises(UserError, match="radii must be one or more finite numbers >= 0"):
        sphere_flatness(cases.make("mlp").landscape(), radii, num_samples=2)


def test_requests_without_meaning_are_refused():
    landscape = cases.make("mlp").landscape()
    with pytest.raises(UserError, match="num_samples must be an integer >= 2, got 1"):
        sphere_flatness(landscape, [1.0], num_samples=1)
    with pytest.raises(UserError, match="Unknown normalisation 'row'.*: none, filter, layer, parameter"):
        sphere_flatness(landscape, [1.0], normalisation="row")
    with pytest.raises(UserError, match="the landscape has none"):
        sphere_flatness(cases.make("mlp").landscape(params="*.bias"), [1.0], normalisation="filter")


def test_an_exception_in_a_measurement_restores_the_model(untouched):
    case = cases.make("conv_bn_channels_last")
    landscape = case.landscape()

    def report(walks):
        raise InterruptedError

    with untouched(case.model), pytest.raises(InterruptedError):
        sphere_flatness(landscape, [5.0], report=report)


def test_costs_add_up():
    assert Cost(1.0, 10) + Cost(0.5, 5, 2, 3.0) == Cost(1.5, 15, 2, 3.0)
