"""Random twins: as long as what they are twins of, with the mean rise of a quadratic, and typical of themselves."""

import cases
import numpy as np
import pytest
import torch
from scipy import stats

from flatlab import typical_rise
from flatlab.errors import UserError
from flatlab.metrics.flatness import sampler
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.results.estimate import standing
from flatlab.seeds import generator


def perturbation(landscape, seed=0):
    """A vector whose filters differ in length."""
    drawn = torch.randn(landscape.num_params, generator=generator("perturbation", seed)).to(landscape.point)
    return 0.1 * drawn * torch.linspace(0.1, 2.0, len(drawn)).to(drawn)


@pytest.mark.parametrize("normalisation", ["none", "layer", "filter", "parameter"])
def test_twins_are_as_long_as_the_perturbation(normalisation):
    landscape = cases.make("conv_bn").landscape()
    e = perturbation(landscape)
    ray = draw_direction(landscape, 0, 3, normalisation=normalisation, like=e)
    pairs = list(zip(landscape.split(ray), landscape.split(e), strict=True))
    if normalisation == "none":
        assert ray.norm().item() == pytest.approx(e.norm().item(), rel=1e-5)
        assert torch.allclose(ray / ray.norm(), draw_direction(landscape, 0, 3))
    for z, each in pairs if normalisation in ("layer", "filter") else ():
        axes = tuple(range(1, each.ndim)) if normalisation == "filter" else None
        lengths = [torch.linalg.vector_norm(t, dim=axes) for t in (z, each)]
        torch.testing.assert_close(*lengths) if each.ndim > 1 else torch.testing.assert_close(z, 0 * z)
    if normalisation == "parameter":
        plain = torch.randn(landscape.num_params, generator=generator("sphere", 0, 3))
        torch.testing.assert_close(ray, plain * e.abs())


@pytest.mark.parametrize("name", cases.MODELS)
def test_rises_are_those_of_the_landscape(name, untouched):
    case = cases.make(name)
    landscape = case.landscape([20, 4])
    e = perturbation(landscape)
    with untouched(case.model):
        found = typical_rise(landscape, {"e": e, "half": e / 2}, normalisation="filter", num_samples=3)
        here = landscape.evaluate().losses
        for row, each in enumerate((e, e / 2)):
            for told, sign in ((found.rises, 1), (found.reverses, -1)):
                expected = landscape.evaluate(landscape.point + sign * each).losses - here
                assert told[row] == pytest.approx(expected, rel=1e-6, abs=1e-8)
            rays = [draw_direction(landscape, 0, k, normalisation="filter", like=each) for k in range(3)]
            walked = [landscape.evaluate(landscape.point + ray).losses - here for ray in rays]
            assert found.visits[row] == pytest.approx(np.array(walked), rel=1e-5, abs=1e-7)
    assert found.norms == pytest.approx([e.norm().item(), e.norm().item() / 2], rel=1e-5)
    assert found.cost.forward_passes == 1 + 2 * (2 + 3) and found.cost.images == 24 * 11


def test_the_mean_over_isotropic_twins_of_a_quadratic_is_known():
    rng = generator("hessian")
    root = torch.randn(12, 12, generator=rng, dtype=torch.float64)
    hessian, slope = root @ root.T, torch.randn(12, generator=rng, dtype=torch.float64)
    landscape = cases.Quadratic(hessian, slope=slope).landscape()
    e = torch.randn(12, generator=rng, dtype=torch.float64)
    found = typical_rise(landscape, {"e": e}, num_samples=2000)
    bent, sloped = 0.5 * e @ hessian @ e, slope @ e
    assert found.rises.item() == pytest.approx((bent + sloped).item())
    assert found.reverses.item() == pytest.approx((bent - sloped).item())
    expected = (e @ e * hessian.trace() / 24).item()
    assert abs(found.value[0] - expected) < 4 * found.stderr[0] and found.stderr[0] < 0.1 * expected


def test_the_mean_over_twins_of_each_filter_follows_the_block_traces():
    case = cases.at_a_minimum()
    landscape = case.landscape([20, 4])
    e = 1e-3 * perturbation(landscape)
    dense, expected, start = case.dense_hessian(landscape.point), 0.0, 0
    for each in landscape.split(e):
        for row in each.flatten(1) if each.ndim > 1 else []:
            block = dense[start : start + len(row), start : start + len(row)]
            expected += 0.5 * (row.square().sum() * block.trace() / len(row)).item()
            start += len(row)
        start += each.numel() if each.ndim < 2 else 0
    found = typical_rise(landscape, {"e": e}, normalisation="filter", num_samples=200)
    assert abs(found.value[0] - expected) < 4 * found.stderr[0] and found.stderr[0] < 0.1 * expected


@pytest.mark.parametrize("normalisation", ["none", "filter"])
def test_a_random_perturbation_is_typical_of_its_own_kind(normalisation):
    landscape = cases.make("mlp").landscape()
    like = perturbation(landscape)
    drawn = {f"{k}": draw_direction(landscape, 99, k, normalisation=normalisation, like=like) for k in range(40)}
    found = typical_rise(landscape, drawn, normalisation=normalisation, num_samples=40)
    assert stats.kstest(found.rank, "uniform").pvalue > 1e-3
    assert abs(found.z.mean()) < 4 / 40**0.5
    assert not np.isclose(found.visits[0], typical_rise(landscape, drawn, num_samples=40, seed=1).visits[0]).any()


def test_the_steepest_direction_is_no_typical_one():
    landscape = cases.Quadratic(torch.diag(torch.tensor([100.0] + 99 * [1.0]).double())).landscape()
    steep, flat = torch.eye(100, dtype=torch.float64)[:2]
    found = typical_rise(landscape, {"steep": steep, "flat": flat}, num_samples=100)
    assert found.z[0] > 10 and found.rank[0] == 101 / 102 and found.rank[1] == 1 / 102


def test_standing_among_draws_is_as_by_hand():
    z, rank = standing(4.0, np.array([1.0, 2.0, 3.0]))
    assert z == 2.0 and rank == 4 / 5
    assert np.isnan(standing(1.0, np.array([1.0, 1.0]))[0])


def test_a_frame_has_a_row_for_each_perturbation_and_a_plot_its_points():
    landscape = cases.make("mlp").landscape()
    e = perturbation(landscape)
    found = typical_rise(landscape, {"whole": e, "half": e / 2}, num_samples=4)
    frame = found.to_frame()
    assert frame["name"].tolist() == ["whole", "half"] and frame["rise"].tolist() == found.rises.mean(axis=1).tolist()
    assert (frame["low"] < frame["value"]).all() and (frame["value"] < frame["high"]).all()
    assert len(found.plot().lines) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": 1}, "num_samples must be an integer >= 2, got 1"),
        ({"perturbations": {}}, "perturbations must be a mapping from names to vectors"),
        ({"perturbations": {"e": torch.zeros(53)}}, "'e' must be finite and not zero"),
        ({"perturbations": {"e": torch.full((53,), float("nan"))}}, "'e' must be finite"),
        ({"perturbations": {"e": torch.zeros(5)}}, "(53,), got (5,)"),
        ({"normalisation": "flter"}, "did you mean filter"),
    ],
)
def test_a_mistake_is_one_sentence(change, words):
    landscape = cases.make("mlp").landscape()
    asked = {"perturbations": {"e": torch.ones(53)}, **change}
    with pytest.raises(UserError) as caught:
        typical_rise(landscape, **asked)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_interruption_is_no_result_and_leaves_the_model_alone(untouched, monkeypatch):
    case = cases.make("mlp")
    landscape = case.landscape()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sampler, "draw_direction", interrupt)
    with untouched(case.model), pytest.raises(KeyboardInterrupt):
        typical_rise(landscape, {"e": torch.ones(53)}, num_samples=4)
