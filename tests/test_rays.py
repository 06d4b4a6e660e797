"""Rays: their lengths, what they are shared by, and what the normalisations are blind to."""

import cases
import numpy as np
import pytest
import torch

from flatlab import seeds
from flatlab.metrics.flatness.perturbations import draw_direction, reach, scale_to_weights
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.metrics.surfaces.directions import given_directions


@pytest.mark.parametrize("name", cases.MODELS)
def test_a_point_lies_at_its_radius(name):
    landscape = cases.make(name).landscape()
    ray = draw_direction(landscape, 3, 1)
    for gamma in (0.1, 1.0, 10.0):
        moved = torch.add(landscape.point, ray, alpha=gamma).double() - landscape.point.double()
        assert moved.norm().item() == pytest.approx(gamma, rel=1e-5)


def test_a_filter_ray_is_as_long_as_each_filter():
    case = cases.make("conv_bn")
    with torch.no_grad():
        case.model[0].weight[2].zero_()
    landscape = case.landscape()
    ray = draw_direction(landscape, 0, 0, normalisation="filter")
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
    ten = cases.walked(landscape, [1.0], range(10), seed=7)
    assert np.array_equal(ten[:5], cases.walked(landscape, [1.0], range(5), seed=7))
    assert np.array_equal(ten[[8, 2]], cases.walked(landscape, [1.0], [8, 2], seed=7))
    assert not np.isclose(ten, cases.walked(landscape, [1.0], range(10), seed=8)).any()
    ray = draw_direction(landscape, 7, 3)
    assert torch.equal(ray.double(), draw_direction(other, 7, 3))
    moved = cases.make("mlp")
    with torch.no_grad():
        moved.model[0].weight.mul_(3.0)
    assert torch.equal(ray, draw_direction(moved.landscape(), 7, 3))


def test_a_generator_gives_one_seed():
    landscape = cases.make("mlp").landscape()
    first = sphere_flatness(landscape, [1.0], num_samples=3, seed=seeds.generator("g"))
    again = sphere_flatness(landscape, [1.0], num_samples=3, seed=first.seed)
    assert np.array_equal(first.samples, again.samples)
    assert first.seed == seeds.base_seed(seeds.generator("g"))


def test_scaling_takes_any_vector():
    landscape = cases.make("mlp").landscape()
    point = landscape.point
    scaled = scale_to_weights(2.0 * point, landscape)
    torch.testing.assert_close(landscape.split(scaled)[0], landscape.split(point)[0])


def test_the_filter_twin_rises_by_the_weighted_block_traces():
    case, rho = cases.at_a_minimum(), 1e-3
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


def rescaled(scale):
    """Two ReLU layers, the first times c and the second by it: the same function."""
    rng = seeds.generator("rescaled")
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64))
        model[0].weight.mul_(scale), model[0].bias.mul_(scale), model[2].weight.div_(scale)
    inputs = torch.randn(40, 6, generator=rng, dtype=torch.float64)
    return cases.Case(model, inputs, torch.randint(0, 3, (40,), generator=rng)).landscape([40])


def test_each_normalisation_is_blind_to_what_it_says():
    values = {}
    for scale in (1.0, 8.0):
        for kind in ("none", "filter", "layer", "parameter"):
            values[scale, kind] = sphere_flatness(rescaled(scale), [0.4], num_samples=4, normalisation=kind).value
    assert values[1.0, "parameter"] == pytest.approx(values[8.0, "parameter"], rel=1e-9)
    # Without biases to move, whole tensors and filters that are scaled take their rays along.
    for kind in ("filter", "layer"):
        assert values[1.0, kind] == pytest.approx(values[8.0, kind], rel=1e-9)
    assert values[1.0, "none"] != pytest.approx(values[8.0, "none"], rel=0.05)


def test_rays_are_as_long_as_what_they_are_scaled_to():
    case = cases.make("conv_bn")
    landscape = case.landscape()
    for z, w in zip(
        landscape.split(draw_direction(landscape, 0, 0, normalisation="layer")), case.model.parameters(), strict=True
    ):
        assert z.norm().item() == pytest.approx(w.norm().item() if w.ndim > 1 else 0.0, rel=1e-5)
    lengths = [draw_direction(landscape, 0, k, normalisation="parameter").norm().item() ** 2 for k in range(400)]
    assert np.mean(lengths) ** 0.5 == pytest.approx(reach(landscape, "parameter"), rel=0.05)
    for kind in ("filter", "layer"):
        assert draw_direction(landscape, 0, 0, normalisation=kind).norm().item() == pytest.approx(
            reach(landscape, kind), rel=1e-5
        )


def test_a_pattern_restricts_what_moves():
    case = cases.make("mlp")
    landscape, moved = case.landscape(params="2.*"), []
    case.model.register_forward_pre_hook(lambda *_: moved.append(case.model[0].weight.detach().clone()))
    flatness = sphere_flatness(landscape, [2.0], num_samples=3)
    assert flatness.num_params == 18 and flatness.value[0] != 0.0
    assert all(torch.equal(each, case.model[0].weight) for each in moved)


@pytest.mark.parametrize("normalisation", ["filter", "layer", "parameter"])
def test_where_a_direction_is_zero_it_stays_zero(normalisation):
    landscape = cases.make("mlp").landscape()
    vector = torch.ones(53)
    still = [(0, 6), (35, 53)] if normalisation != "layer" else [(0, 30)]  # one filter and a head, or one matrix
    for start, stop in still:
        vector[start:stop] = 0.0
    found = given_directions(landscape, [vector], normalisation=normalisation).vectors[0]
    assert torch.isfinite(found).all() and found.any()
    for start, stop in still:
        assert not found[start:stop].any()
    moved = landscape.split(found)[0][1:] if normalisation == "filter" else landscape.split(found)[2]
    wanted = (
        landscape.split(landscape.point)[0][1:] if normalisation == "filter" else landscape.split(landscape.point)[2]
    )
    if normalisation != "parameter":
        torch.testing.assert_close(moved.norm(), wanted.norm())
