"""Lines and planes: closed forms at every place, an independent loop, refinement, resuming, mistakes."""

import cases
import numpy as np
import pytest
import spectra
import torch
import torch.nn.functional as F
from stores import refuses
from torch import nn

from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.surfaces import planes
from flatlab.metrics.surfaces.directions import (
    eigen_directions,
    given_directions,
    plane_through,
    random_directions,
    trajectory_directions,
)
from flatlab.metrics.surfaces.planes import line, plane


def bowl(slope=True):
    """A quadratic whose value is known at every place."""
    matrix = spectra.rotated([5.0, 2.0, 1.0, 0.5, 0.1, -0.3], "surface")
    b = torch.arange(6, dtype=torch.float64) / 10 if slope else None
    start = torch.linspace(-0.5, 0.7, 6, dtype=torch.float64)
    return matrix, b, cases.Quadratic(matrix, start, slope=b).landscape()


def exact(matrix, b, landscape, vectors, x, y):
    """The quadratic on the grid, by one matrix product: shares no code with the walker."""
    places = np.stack(np.meshgrid(x, y, indexing="ij"), -1).reshape(-1, 2)
    points = landscape.point.numpy() + places @ vectors.double().numpy()
    values = 0.5 * np.einsum("np,pq,nq->n", points, matrix.numpy(), points) + points @ b.numpy()
    return values.reshape(len(x), len(y))


def plane_of_bowl(**kwargs):
    matrix, b, landscape = bowl()
    vectors = [torch.eye(6, dtype=torch.float64)[0], torch.ones(6, dtype=torch.float64)]
    return (
        exact,
        (matrix, b, landscape, torch.stack(vectors)),
        plane(landscape, given_directions(landscape, vectors), **kwargs),
    )


# ------------------------------------------------------------------------------------------------ closed forms


def test_every_place_of_a_plane_has_its_own_value():
    form, known, surface = plane_of_bowl(grid=(np.linspace(-1, 2, 7), np.linspace(-3, 1, 6)))
    assert surface.of()[:, :] == pytest.approx(form(*known, surface.x, surface.y), rel=1e-12, abs=1e-12)
    assert surface.measured.all() and surface.metrics == ("loss",) and surface.values.shape == (7, 6, 1, 1)
    assert surface.cost.forward_passes == 42 and surface.cosine == pytest.approx(1 / 6**0.5)


def test_a_sheared_walk_is_seen(monkeypatch):
    """The fault of a known tool: each row begins where the last one ended, one cell off."""
    rows = []

    def sheared(vectors, place, *, out):
        rows.append(place[0])
        odd = len(set(rows)) % 2
        return torch.add(place[0] * vectors[0], (place[1] + 0.4 * odd) * vectors[1], out=out)

    monkeypatch.setattr(planes, "displacement", sheared)
    form, known, surface = plane_of_bowl(grid=6)
    assert np.abs(surface.of() - form(*known, surface.x, surface.y)).max() > 0.1


@pytest.mark.parametrize("name", cases.MODELS)
@pytest.mark.parametrize("cut", cases.CUTS)
def test_places_are_those_of_an_independent_loop(name, cut, untouched):
    case = cases.make(name)
    landscape = case.landscape(cases.CUTS[cut])
    with untouched(case.model):
        surface = plane(landscape, grid=3, seed=4)
    u, v = (draw_direction(landscape, 4, k, normalisation="filter") for k in range(2))
    for i, a in enumerate((-1.0, 0.0, 1.0)):
        for j, b in enumerate((-1.0, 0.0, 1.0)):
            there = landscape.evaluate(landscape.point + (a * u + b * v))
            assert surface.values[i, j, 0] == pytest.approx([there.loss, there.accuracy], rel=1e-5)
    assert surface.of()[1, 1] == landscape.base_loss[0]  # the middle is the point, to the last bit


def test_lines_are_evaluated_along_each_direction():
    matrix, b, landscape = bowl()
    vectors = spectra.normal("lines", shape=(3, 6))
    profile = line(landscape, given_directions(landscape, list(vectors)), grid=[-1.0, 0.0, 0.5, 2.0])
    points = landscape.point.numpy() + profile.places[:, None] * vectors.numpy()[:, None]  # (3, 4, 6)
    expected = 0.5 * np.einsum("dgp,pq,dgq->dg", points, matrix.numpy(), points) + points @ b.numpy()
    assert profile.of() == pytest.approx(expected, rel=1e-12)
    assert profile.value == pytest.approx(expected.mean(axis=0), rel=1e-12)


def test_a_profile_has_a_band_over_its_directions():
    landscape = cases.make("mlp").landscape()
    profile = line(landscape, grid=5, seed=3)
    assert profile.values.shape == (5, 5, 1, 2) and profile.over == "directions"
    assert profile.of()[:, 2] == pytest.approx(landscape.base_loss[0], rel=1e-7)
    rays = [draw_direction(landscape, 3, k, normalisation="filter") for k in range(5)]
    ends = np.array([landscape.evaluate(landscape.point + 0.5 * ray).loss for ray in rays])
    assert profile.of()[:, 3] == pytest.approx(ends, rel=1e-6)
    assert profile.value[3] == pytest.approx(ends.mean(), rel=1e-6)
    assert profile.stderr[3] == pytest.approx(ends.std(ddof=1) / 5**0.5, rel=1e-3)
    frame = profile.to_frame()
    assert len(frame) == 5 * 5 * 2 and set(frame.metric) == {"loss", "accuracy"}


def test_the_result_depends_on_the_seed():
    landscape = cases.make("mlp").landscape()
    first, again, other = (plane(landscape, grid=3, seed=seed).values for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_filter_normalised_surfaces_do_not_see_the_scale_of_a_filter():
    case = cases.make("conv_bn").double()
    before = plane(case.landscape(), grid=5)
    conv, norm = case.model[0], case.model[1]
    with torch.no_grad():
        scale = torch.tensor([0.5, 2.0, 3.0, 0.2], dtype=torch.float64)
        conv.weight *= scale[:, None, None, None]
        conv.bias *= scale
        norm.running_mean *= scale
        norm.weight *= torch.sqrt(norm.running_var * scale**2 + norm.eps) / torch.sqrt(norm.running_var + norm.eps)
        norm.running_var *= scale**2
        norm.weight /= scale
    assert plane(case.landscape(), grid=5).values == pytest.approx(before.values, rel=1e-9)


# -------------------------------------------------------------------------------- strata, metrics, non-finite


def test_strata_and_metrics_stand_side_by_side():
    case = cases.make("mlp")
    batches = case.batches([5, 12, 7])
    landscape = Landscape(case.model, {"few": batches[:1], "many": batches[1:]}, case.loss)
    margin = {"loss": case.loss, "margin": lambda o, t: o.topk(2).values.diff().abs().squeeze(1)}
    surface = plane(landscape, grid=3, metrics=margin)
    assert surface.values.shape == (3, 3, 2, 2) and surface.metrics == ("loss", "margin")
    alone = Landscape(case.model, batches[1:], case.loss)
    assert surface.of("loss", "many") == pytest.approx(plane(alone, grid=3).of("loss"), rel=1e-6)
    with torch.no_grad():
        expected = margin["margin"](case.model(batches[0][0]), None).mean().item()
    assert surface.of("margin", "few")[1, 1] == pytest.approx(expected, rel=1e-6)
    refuses(lambda: surface.of("loss", "few!"), "Unknown stratum", "few")
    refuses(lambda: surface.of("nothing"), "Unknown metric", "margin")


class Cliff(nn.Module):
    """Not finite beyond w0 = 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x * 0 + self.w.square().sum() + torch.where(self.w[0] > 1, torch.inf, 0.0)


def cliff():
    data = [(torch.zeros(2), torch.zeros(2))]
    landscape = Landscape(Cliff().eval(), data, lambda outputs, targets: outputs)
    return landscape, given_directions(landscape, torch.eye(2))


def test_what_is_not_finite_is_kept_and_refined_around():
    landscape, axes = cliff()
    places = np.linspace(-2, 2, 33)
    whole = plane(landscape, axes, grid=(places, places))
    assert np.isinf(whole.of()[places > 1]).all() and np.isfinite(whole.of()[places <= 1]).all()
    refined = plane(landscape, axes, grid=(places, places), refine=0.05)
    assert np.isfinite(refined.of()[places <= 0.9]).all() and np.isinf(refined.of()[places > 1]).all()
    assert refined.measured.mean() < 0.8
    assert not np.isfinite(line(landscape, axes, grid=[0.0, 2.0]).value[1])


# ------------------------------------------------------------------------------------------------- refinement


def test_refinement_spends_places_where_the_surface_bends():
    landscape = cases.make("conv_bn").landscape()
    whole = plane(landscape, grid=33, metrics={"loss": F.cross_entropy})
    refined = plane(landscape, grid=33, metrics={"loss": F.cross_entropy}, refine=0.05)
    assert refined.measured.sum() == refined.cost.forward_passes < 0.7 * 33**2
    assert np.array_equal(refined.values[refined.measured], whole.values[refined.measured])
    height = whole.of() - whole.of().min() + 0.02 * np.ptp(whole.of())
    assert (np.abs(refined.of() - whole.of()) / height).max() < 0.15
    flat = cases.Quadratic(torch.zeros(2, 2, dtype=torch.float64), slope=torch.ones(2, dtype=torch.float64))
    straight = flat.landscape()
    tilted = plane(straight, given_directions(straight, torch.eye(2)), grid=17, refine=0.05)
    assert tilted.measured.sum() == 81  # a tilted plane needs no more than the coarsest grid
    assert tilted.of() == pytest.approx(np.add.outer(tilted.x, tilted.y), abs=1e-12)


def test_a_surface_goes_on_where_it_was_stopped():
    landscape, kept, computed = cases.make("mlp").landscape(), {}, []

    def keep(units, stop=10**9):
        for name, compute in units:
            if name not in kept:
                if len(computed) == stop:
                    raise KeyboardInterrupt
                computed.append(name)
                kept[name] = compute()
            yield kept[name]

    told = []
    with pytest.raises(KeyboardInterrupt):
        plane(landscape, grid=17, refine=0.1, keep=lambda units: keep(units, 3))
    resumed = plane(landscape, grid=17, refine=0.1, keep=keep, report=lambda *each: told.append(each))
    assert np.array_equal(resumed.values, plane(landscape, grid=17, refine=0.1).values)
    assert len(computed) == len(set(computed)) == len(kept) and told[-1][0] == resumed.measured.sum()


# ------------------------------------------------------------------------------------------------- directions


def test_random_directions_are_gaussian_and_as_long_as_the_filters():
    landscape = cases.make("conv_bn").landscape()
    found = random_directions(landscape, count=3, seed=2)
    for z, w in zip(landscape.split(found.vectors[0]), landscape.split(landscape.point), strict=True):
        if w.ndim > 1:
            assert z.flatten(1).norm(dim=1) == pytest.approx(w.flatten(1).norm(dim=1), rel=1e-5)
        else:
            assert not z.any()
    large = Landscape(nn.Linear(400, 50).eval(), [(torch.zeros(2, 400), torch.tensor([0, 1]))], F.cross_entropy)
    z = random_directions(large, seed=5)
    assert abs(z.cosine) < 0.03  # those of uniform numbers would have 0.75
    weights = large.split(z.vectors[0])[0]
    assert abs((weights / weights.std()).pow(4).mean().item() - 3) < 0.15  # uniform numbers: 1.8


def test_eigenvectors_are_those_of_the_hessian():
    matrix, _, landscape = bowl()
    found = eigen_directions(landscape)
    vectors = np.linalg.eigh(matrix.numpy())[1]
    assert np.abs(found.vectors.numpy() @ vectors[:, [-1, -2]]) == pytest.approx(np.eye(2), abs=1e-6)
    assert found.labels == ("eigenvector of λ = 5 (L2)", "eigenvector of λ = 2 (L2)")
    lowest = eigen_directions(landscape, count=1, which="SA").vectors[0].numpy()
    assert abs(lowest @ vectors[:, 0]) == pytest.approx(1, abs=1e-6)


def test_the_plane_through_three_checkpoints_holds_them():
    _, _, landscape = bowl()
    rng = torch.Generator().manual_seed(0)
    second, third = (landscape.point + torch.randn(6, generator=rng, dtype=torch.float64) for _ in range(2))
    found = plane_through(landscape, second, third, names=("a", "b", "c"))
    assert found.vectors @ found.vectors.T == pytest.approx(np.eye(2), abs=1e-12)
    assert not found.marks[0].any() and found.distances == pytest.approx(0, abs=1e-12)
    assert found.marks[1] == pytest.approx([(second - landscape.point).norm().item(), 0])
    for point, mark in zip((second, third), found.marks[1:], strict=True):
        there = landscape.point + torch.as_tensor(mark) @ found.vectors
        assert there == pytest.approx(point, abs=1e-12)
    surface = plane(landscape, found, grid=9)
    assert surface.x[0] < found.marks[:, 0].min() and surface.x[-1] > found.marks[:, 0].max()
    assert np.array_equal(surface.marks, found.marks) and surface.mark_labels == ("a", "b", "c")
    at_second = plane(landscape, found, grid=([0.0, found.marks[1, 0]], [0.0, 1.0]))
    assert at_second.of()[1, 0] == pytest.approx(landscape.evaluate(second).loss, rel=1e-12)


def test_principal_directions_of_a_trajectory():
    _, _, landscape = bowl()
    u, v = torch.linalg.qr(spectra.normal("pca", shape=(6, 2)))[0].T
    t = torch.linspace(0, 3, 12, dtype=torch.float64)
    away = torch.linalg.qr(torch.stack([u, v, *torch.eye(6, dtype=torch.float64)]).T)[0][:, 2]
    centred = t - t.mean()
    points = [landscape.point + 5 * c * u + (c**2).item() * v + 1e-3 * (-1) ** k * away for k, c in enumerate(centred)]
    found = trajectory_directions(landscape, points)
    rows = torch.stack(points).numpy()
    _, values, axes = np.linalg.svd(rows - rows.mean(0))
    values = values**2
    rest = (rows - landscape.point.numpy()) @ axes[2:].T
    assert found.explained == pytest.approx(values[:2] / values.sum(), rel=1e-9)
    assert abs(float(found.vectors[0] @ u)) == pytest.approx(1, abs=1e-4)
    assert found.connected and found.distances == pytest.approx(np.linalg.norm(rest, axis=1), rel=1e-6)
    assert len(found.marks) == 12 and (found.distances < 2e-3).all()
    assert "of the variance" in found.labels[0]


# ------------------------------------------------------------------------------------------- files and drawings


def test_the_table_of_a_surface_says_which_places_were_evaluated():
    landscape = cases.make("mlp").landscape()
    surface = plane(landscape, plane_through(landscape, landscape.point + 1, 2 * landscape.point), grid=17, refine=0.1)
    frame = surface.to_frame()
    assert len(frame) == 17 * 17 * 2 and frame.measured.sum() == 2 * surface.measured.sum()


def test_pictures_hold_what_they_say():
    landscape = cases.make("mlp").landscape()
    surface = plane(landscape, plane_through(landscape, landscape.point + 1, 2 * landscape.point), grid=9)
    ax = surface.plot()
    assert "L2" in ax.get_xlabel() and {text.get_text() for text in ax.texts} >= {"1", "2", "3"}
    assert surface.plot(kind="relief").get_zlabel() == "loss (nats)"
    assert surface.plot(metric="accuracy", levels=[0.1, 0.5, 0.9]) is not None
    profile = line(landscape, grid=5).plot()
    assert profile.get_ylabel() == "loss (nats)" and "5 directions" in profile.get_xlabel()


# ---------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_one_sentence():
    landscape = cases.make("mlp").landscape()
    other = cases.make("conv_bn").landscape()
    axes = random_directions(landscape)
    for grid in (1, 0, [0.5], [0.0, np.inf], [1.0, 1.0]):
        refuses(lambda grid=grid: line(landscape, grid=grid), "grid must", f"got {grid!r}")
    refuses(lambda: plane(landscape, grid=([0.0, 1.0], [0.0])), "grid must have at least two places")
    refuses(lambda: plane(landscape, random_directions(landscape, count=1)), "two directions")
    refuses(lambda: plane(other, axes), "not of this landscape's model")
    refuses(lambda: line(other, axes), "not of this landscape's model")
    refuses(lambda: plane(landscape, refine=0.0), "refine")
    refuses(lambda: plane(landscape, metrics={}), "metric")
    refuses(lambda: given_directions(landscape, []), "vectors must be one flat vector", "got none")
    refuses(lambda: given_directions(landscape, [torch.zeros(landscape.num_params)]), "not zero")
    refuses(lambda: given_directions(landscape, [torch.full((landscape.num_params,), torch.nan)]), "finite")
    w = landscape.point
    refuses(lambda: plane_through(landscape, w, w + 1), "span a plane")
    refuses(lambda: plane_through(landscape, w + 1, w + 2), "one line")
    refuses(lambda: plane_through(landscape, other.point, w + 2), "not of this landscape's model")
    refuses(lambda: trajectory_directions(landscape, [w, w + 1]), "at least 3 checkpoints")
    refuses(lambda: trajectory_directions(landscape, [w, w + 1, w + 2, w + 3]), "do not span")
