"""Eigenpairs and the density of eigenvalues against given spectra, dense autograd and other libraries."""

import itertools

import cases
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from spectra import LAYOUTS, dense, double, landscape_of, normal, quadratic, softmax_regression

from flatlab.derivatives.operators import Hessian
from flatlab.derivatives.outer import GGN
from flatlab.errors import UserError
from flatlab.metrics.curvature import density as density_module
from flatlab.metrics.curvature import eigenvalues
from flatlab.metrics.curvature import krylov as krylov_module
from flatlab.metrics.curvature.density import spectral_density
from flatlab.metrics.curvature.eigenvalues import EXTRA, hessian_spectrum
from flatlab.metrics.curvature.krylov import Krylov

SPECTRA = {
    "uniform": np.linspace(-1.0, 5.0, 60),
    "clustered": np.r_[10.0, 10.001, 9.999, np.linspace(-3.0, 1.0, 80)],
    "multiple": np.r_[5.0, 5.0, 5.0, 1.0, 1.0, np.zeros(30)],
    "outliers": np.r_[np.geomspace(1e-3, 100.0, 150), -np.geomspace(1e-3, 3.0, 50)],
    "one": np.ones(20),
    "none": np.zeros(10),
}


def wanted(values, k, which):
    values = np.sort(values)
    return {
        "LA": values[::-1][:k],
        "SA": values[:k],
        "BE": np.r_[values[: k // 2], values[len(values) - k + k // 2 :]],
    }[which]


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
def test_given_eigenvalues_are_found(name, which):
    spectrum = hessian_spectrum(quadratic(SPECTRA[name]), k=5, which=which, tol=1e-3, budget=500)
    expected, scale = wanted(SPECTRA[name], 5, which), np.abs(SPECTRA[name]).max()
    assert spectrum.converged
    # Clustered ones are told apart no better than tol; the bound holds for some eigenvalue each.
    assert np.all(np.abs(spectrum.eigenvalues - expected) <= 1e-3 * np.abs(expected) + 1e-9 * scale)
    nearest = np.abs(SPECTRA[name] - spectrum.eigenvalues[:, None]).min(axis=1)
    assert np.all(nearest <= spectrum.residuals + 1e-9 * scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", cases.MODELS)
def test_eigenpairs_of_networks_agree_with_dense_autograd(name, layout, untouched):
    case = double(name)
    with untouched(case.model):
        spectrum = hessian_spectrum(landscape_of(case, layout), k=6, vectors=True)
    matrix = dense(name, layout)
    expected = torch.linalg.eigvalsh(matrix).numpy()[::-1][:6]
    assert spectrum.eigenvalues == pytest.approx(expected, rel=1e-3)
    vectors, values = spectrum.eigenvectors, torch.from_numpy(spectrum.eigenvalues)
    residuals = torch.linalg.vector_norm(matrix @ vectors - vectors * values, dim=0).numpy()
    assert spectrum.residuals == pytest.approx(residuals, abs=1e-9)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_float32_is_good_to_what_it_says(name):
    spectrum = hessian_spectrum(cases.make(name).landscape([20, 4]), k=6, tol=1e-4)
    assert spectrum.converged
    assert spectrum.eigenvalues == pytest.approx(torch.linalg.eigvalsh(dense(name, "one")).numpy()[::-1][:6], rel=2e-4)


def test_softmax_regression_has_the_eigenvalues_of_its_closed_form():
    landscape, matrix = softmax_regression()
    expected = torch.linalg.eigvalsh(matrix).numpy()
    for make in (Hessian, GGN):
        assert hessian_spectrum(make(landscape), k=12).eigenvalues == pytest.approx(expected[::-1], abs=1e-10)


def test_the_basis_is_bounded_and_orthonormal_through_restarts():
    operator = Hessian(quadratic(SPECTRA["uniform"]))
    spectrum = hessian_spectrum(operator, k=3, tol=1e-8, vectors=True)
    assert spectrum.cost.hvps == operator.products > 3 + EXTRA  # it had to restart
    assert spectrum.converged
    krylov = Krylov(operator, normal("start", shape=(60,)), 17)
    while not krylov.full:
        krylov.extend()
    values, coefficients = krylov.ritz()
    krylov.restart(coefficients[:, -6:], values[-6:])
    for _ in range(4):
        krylov.extend()
    assert krylov.basis.shape == (17, 60)
    torch.testing.assert_close(
        krylov.vectors @ krylov.vectors.T, torch.eye(10, dtype=torch.float64), atol=1e-13, rtol=0
    )
    projected = krylov.vectors @ (operator @ krylov.vectors.T)
    assert krylov.projection[:10, :10] == pytest.approx(projected.numpy(), abs=1e-12)


def crowded(kind):
    """Return a spectrum whose wanted eigenvalues stand so close that a first convergence misses some."""
    rng = np.random.default_rng(3)
    bulk = 0.02 * np.abs(rng.normal(size=600)) ** 3
    tops = {"cluster": 1 + rng.uniform(0, 0.1, 12), "many": rng.lognormal(0, 0.3, 60)}
    tops["near copies"] = np.repeat(rng.lognormal(0, 1, 8), 2) * (1 + 1e-3 * rng.normal(size=16))
    return np.r_[tops[kind], bulk]


def missed():
    """Count the searches in crowds that converge, and are off by more than was asked for."""
    off = 0
    for kind in ("cluster", "many", "near copies"):
        values = crowded(kind)
        for seed in range(5):
            spectrum = hessian_spectrum(quadratic(values), k=10, tol=1e-2, seed=seed)
            assert spectrum.converged
            off += spectrum.eigenvalues != pytest.approx(wanted(values, 10, "LA"), rel=1e-2)
    return off


def test_a_crowd_hides_eigenvalues_from_a_first_convergence_alone(monkeypatch):
    assert missed() <= 1
    for wait in ("STEADY", "CONVERGED"):
        monkeypatch.setattr(eigenvalues, wait, (0, 0.0))
    assert missed() >= 5


def test_a_search_that_was_soon_steady_ends_sooner(monkeypatch):
    landscape = quadratic(np.r_[10.0, np.linspace(0.0, 1.0, 300)])
    soon = hessian_spectrum(landscape, k=1)
    monkeypatch.setattr(eigenvalues, "CONVERGED", (8, 100.0))
    late = hessian_spectrum(landscape, k=1)
    assert soon.converged and late.converged and soon.cost.hvps + 3 <= late.cost.hvps
    assert soon.eigenvalues == pytest.approx([10.0], rel=1e-6)


def test_a_search_that_its_budget_ends_is_not_converged():
    spectrum = hessian_spectrum(quadratic(SPECTRA["uniform"]), k=5, budget=8)
    assert (spectrum.cost.hvps, spectrum.converged) == (8, False)
    frame = spectrum.to_frame()
    assert list(frame.columns) == ["index", "value", "residual", "converged"]
    low, high = spectrum.interval()
    assert np.all(low < high)
    spectrum.plot(), plt.gcf().canvas.draw()


def test_converged_pairs_are_not_verified_before_the_search_is_seen_to_its_end():
    landscape = quadratic(np.r_[10.0, 5.0, np.linspace(0.1, 1.0, 60)])
    whole = hessian_spectrum(landscape, k=2, tol=1e-2)
    assert whole.converged_each.all() and whole.verified and whole.converged
    cut = hessian_spectrum(landscape, k=2, tol=1e-2, budget=whole.cost.hvps - 1)
    assert cut.converged_each.all() and not cut.verified and not cut.converged
    assert hessian_spectrum(quadratic([3.0, 2.0, 1.0]), k=1, tol=1e-9).verified  # the basis spans the space


def test_many_pairs_of_few_parameters_are_solved_at_once():
    values = np.r_[np.repeat(5.0, 3), np.linspace(0.1, 1.0, 61)]  # three copies, which a search may miss
    operator = Hessian(quadratic(values))
    spectrum = hessian_spectrum(operator, k=8)
    assert (spectrum.cost.hvps, spectrum.verified, spectrum.converged) == (64, True, True)
    assert spectrum.eigenvalues == pytest.approx(wanted(values, 8, "LA"), rel=1e-10)
    assert hessian_spectrum(operator, k=8, budget=63).cost.hvps < 63  # too few for that: a search
    assert hessian_spectrum(operator, k=7).cost.hvps < 64


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_a_small_problem_is_solved_exactly_where_the_search_does_not_end(which):
    values = np.r_[np.geomspace(1e-4, 30.0, 200), -np.geomspace(1e-4, 1e-2, 121)]
    operator = Hessian(quadratic(values))
    spectrum = hessian_spectrum(operator, k=2, which=which, tol=1e-4, vectors=True)
    assert spectrum.converged and spectrum.cost.hvps == operator.products <= 2 * eigenvalues.BUDGET + 321
    assert spectrum.eigenvalues == pytest.approx(wanted(values, 2, which), rel=1e-4)
    assert spectrum.eigenvalues != pytest.approx(wanted(values, 4, which)[-2:], rel=1e-4)
    products = operator @ spectrum.eigenvectors
    assert torch.linalg.vector_norm(products - spectrum.eigenvectors * torch.tensor(spectrum.eigenvalues)) < 2e-3
    exact = hessian_spectrum(operator, k=2, which=which, budget=321)
    assert exact.converged and exact.cost.hvps == 321
    assert exact.eigenvalues == pytest.approx(wanted(values, 2, which), rel=1e-10)
    short = hessian_spectrum(operator, k=2, which="SA", tol=1e-9, budget=100)
    assert short.cost.hvps == 100 and not short.converged


def test_the_seed_names_the_start():
    landscape = double("mlp").landscape()
    first, second, other = (hessian_spectrum(landscape, k=2, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.eigenvalues, second.eigenvalues)
    assert not np.array_equal(first.eigenvalues, other.eigenvalues)
    assert first.eigenvectors is None


# ---------------------------------------------------------------------------------------------------------- density


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_quadrature_is_exact_for_polynomials_below_twice_the_steps(orthogonal):
    values = np.linspace(-1.0, 2.0, 12)
    operator, steps = Hessian(quadratic(values)), 4
    density = spectral_density(operator, num_vectors=3, steps=steps, seed=5, reorthogonalise=orthogonal)
    for index, (nodes, weights) in enumerate(zip(density.nodes, density.weights, strict=True)):
        start = krylov_module.draw(operator, "signs", "density", 5, index)
        power = start / start.norm()
        moments = [(power @ start / start.norm()).item()]
        for _ in range(2 * steps):
            power = operator @ power
            moments.append((power @ start / start.norm()).item())
        found = [(weights * nodes**p).sum() for p in range(2 * steps + 1)]
        assert found[:-1] == pytest.approx(moments[:-1], rel=1e-9)
        assert found[-1] != pytest.approx(moments[-1], rel=1e-6)


def test_the_mean_over_all_signs_is_the_exact_trace(monkeypatch):
    operator = Hessian(quadratic([3.0, 1.0, 0.5, -2.0]))
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product([-1.0, 1.0], repeat=4)]
    monkeypatch.setattr(density_module, "draw", lambda operator, kind, *names: signs[names[-1]])
    density = spectral_density(operator, num_vectors=16, steps=3)
    assert density.moment(1).value == pytest.approx(2.5 / 4, rel=1e-12)
    assert density.moment(2).value == pytest.approx(14.25 / 4, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", cases.MODELS)
def test_moments_of_networks_agree_with_dense_autograd(name, layout):
    density = spectral_density(landscape_of(double(name), layout), num_vectors=8, steps=6)
    values = torch.linalg.eigvalsh(dense(name, layout)).numpy()
    for power in (1, 2):
        moment = density.moment(power)
        assert abs(moment.value - (values**power).mean()) < 5.4 * moment.stderr  # t with 7 degrees: 0.1 %
    negative = density.negative_weight
    assert abs(negative.value - np.maximum(-values, 0).sum() / np.abs(values).sum()) < 5.4 * negative.stderr + 0.03


def test_the_density_integrates_to_one_and_lies_where_the_eigenvalues_do():
    values = np.r_[np.full(30, -1.0), np.full(60, 0.5), np.full(10, 4.0)]
    density = spectral_density(quadratic(values), num_vectors=40, steps=10)
    assert {len(nodes) for nodes in density.nodes} == {3}  # it stops where the basis breaks down: no ghosts
    grid = density.grid(4000)
    assert np.trapezoid(density.density(grid), grid) == pytest.approx(1.0, abs=2e-4)
    low, high = density.band(grid)
    assert np.all(low <= density.density(grid)) and np.all(density.density(grid) <= high)
    for place, share in ((-1.0, 0.3), (0.5, 0.6), (4.0, 0.1)):
        mass = density.mean(lambda nodes, place=place: (np.abs(nodes - place) < 0.1).astype(float))
        assert abs(mass.value - share) < 3.5 * mass.stderr
    assert abs(density.negative_share.value - 0.3) < 3.5 * density.negative_share.stderr
    assert abs(density.negative_weight.value - 0.3) < 3.5 * density.negative_weight.stderr  # 30 of 30 + 30 + 40
    assert len(density.to_frame()) == 120
    axes = density.plot()
    plt.gcf().canvas.draw()
    edge = axes.collections[0].get_paths()[0].vertices[1:-1]  # the band: its ends are at equal factors of the density
    low, high = (np.interp(0.5, *side[np.argsort(side[:, 0])].T) for side in np.array_split(edge, 2))
    at = float(density.density([0.5])[0])
    assert axes.get_ylim()[0] < low < at < high and low * high == pytest.approx(at**2, rel=1e-2)


def test_plain_lanczos_gives_the_same_moments_but_ghosts_of_outliers():
    values = np.r_[100.0, np.linspace(0.0, 1.0, 99)]
    operator = Hessian(quadratic(values))
    whole, plain = (spectral_density(operator, steps=40, num_vectors=2, reorthogonalise=each) for each in (True, False))
    assert plain.moment(2).value == pytest.approx(whole.moment(2).value, rel=1e-9)
    assert [(nodes > 50).sum() for nodes in whole.nodes] == [1] * 2
    assert max((nodes > 50).sum() for nodes in plain.nodes) > 1


# ------------------------------------------------------------------------------------------ bad input, bugs, libraries


def test_bad_input_is_refused():
    landscape = double("mlp").landscape()
    for k in (0, 54):
        with pytest.raises(UserError, match=f"k must be between 1 and the 53 parameters, got {k}"):
            hessian_spectrum(landscape, k=k)
    with pytest.raises(UserError, match="Unknown end of the spectrum 'LM'.*: LA, SA, BE"):
        hessian_spectrum(landscape, which="LM")
    for wrong in ({"num_vectors": 0}, {"steps": 0}):
        with pytest.raises(UserError, match="num_vectors and steps must be at least 1"):
            spectral_density(landscape, **wrong)
    single = spectral_density(landscape, num_vectors=1, steps=3)
    with pytest.raises(UserError, match="A band needs num_vectors of at least 2"):
        single.band(single.grid())
    with pytest.raises(UserError, match="width sigma of the kernel must be > 0, got -1"):
        single.density([0.0], -1.0)


def loose(monkeypatch):  # Lanczos without orthogonalisation
    def once(self, vector):
        last = self.vectors[-2:]
        part = last @ vector
        vector.addmv_(last.T, part, alpha=-1.0)
        return np.r_[np.zeros(self.size - len(part)), part.numpy()]

    monkeypatch.setattr(Krylov, "_orthogonalise", once)


def halved(monkeypatch):
    true = Krylov.restart
    monkeypatch.setattr(eigenvalues, "SMALL", 0)  # else the whole matrix is solved in the end
    monkeypatch.setattr(Krylov, "restart", lambda self, c, v: true(self, c, v / 2))


def swapped(monkeypatch):
    true = Hessian.__matmul__
    monkeypatch.setattr(Hessian, "__matmul__", lambda self, v: -true(self, v))


@pytest.mark.parametrize("bug", [loose, halved, swapped])
def test_planted_bugs_in_the_eigensolver_are_caught(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test_given_eigenvalues_are_found("outliers", "SA")


def test_unused_weights_would_be_caught(monkeypatch):
    true = np.linalg.eigh

    def uniform(matrix):
        values, vectors = true(matrix)
        return values, np.full_like(vectors, len(values) ** -0.5)

    monkeypatch.setattr(np.linalg, "eigh", uniform)
    with pytest.raises(AssertionError):
        test_the_quadrature_is_exact_for_polynomials_below_twice_the_steps(True)


def test_scipy_converges_in_no_fewer_products():
    for name in ("conv_bn", "vit"):
        landscape = double(name).landscape()
        ours, theirs = hessian_spectrum(landscape, k=10, tol=1e-2), Hessian(landscape)
        start = normal("arpack", shape=(landscape.num_params,)).numpy()
        found = scipy.sparse.linalg.eigsh(theirs.to_scipy(), k=10, which="LA", tol=1e-2, v0=start)[0]
        assert ours.eigenvalues == pytest.approx(found[::-1], rel=1e-2)
        assert ours.cost.hvps - eigenvalues.STEADY[0] <= 1.1 * theirs.products  # SciPy looks for none that it missed


@pytest.mark.oracle
def test_pyhessian_finds_the_same_eigenvalues():
    case = cases.make("conv_bn").double()
    values, _ = cases.by_pyhessian(case, "eigenvalues", maxIter=2000, tol=1e-9, top_n=2)
    found = hessian_spectrum(case.landscape([5, 1, 11, 7]), k=2, tol=1e-6).eigenvalues
    assert found == pytest.approx(np.array(values), rel=1e-4)
