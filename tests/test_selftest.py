"""The self-test passes here, and fails where a bug is planted: those of the field's tools, and others."""

import commandline
import numpy as np
import pytest
import torch

from flatlab import seeds
from flatlab.derivatives.operators import Curvature
from flatlab.landscape.landscape import Landscape
from flatlab.metrics import closed_forms, selftest
from flatlab.metrics.curvature import density, eigenvalues, krylov, trace
from flatlab.metrics.flatness import perturbations
from flatlab.metrics.surfaces import planes
from flatlab.results import spectrum

CPU = {"device": "cpu", "dtype": torch.float64}


def failures(*groups):
    """The checks of some groups that fail, by name; those that raise count."""
    guarded = [check for group in groups for check in selftest._guarded(group, CPU, "cpu")]
    return [check.name for check in guarded if not check.passed]


@pytest.mark.slow
def test_every_check_passes_here(capfd):
    assert commandline.call("selftest") == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("ok")]
    assert len(lines) > 150 and {"cpu float64", "cpu float32"} <= {line[4:15].strip() for line in lines}
    assert all("expected" in line and "got" in line and "within" in line for line in lines)


@pytest.mark.parametrize("name", ["quadratic", "softmax_regression", "linear_gaussian", "deep_linear"])
def test_the_closed_forms_are_those_of_dense_autograd(name):
    problem = getattr(closed_forms, name)(CPU)
    w = problem.landscape.point
    dense = torch.autograd.functional.hessian(lambda v: problem.value(v[None])[0], w)
    assert problem.hessian == pytest.approx(dense, rel=1e-9, abs=1e-12)
    assert problem.landscape.base_loss[0] == pytest.approx(problem.value(w[None]).item(), rel=1e-12)


# ------------------------------------------------------------------------------------------------- planted bugs


def test_a_sheared_grid_is_caught(monkeypatch):
    original, rows = planes.displacement, []

    def sheared(vectors, place, *, out):
        rows.append(place[0])
        return original(vectors, [place[0], place[1] + 0.2 * (len(set(rows)) % 2)], out=out)

    monkeypatch.setattr(planes, "displacement", sheared)
    assert any("plane" in name for name in failures(selftest._surfaces))


def test_uniform_directions_are_caught(monkeypatch):
    monkeypatch.setattr(torch, "randn", torch.rand)
    failed = failures(selftest._randomness)
    assert {"cpu: directions, largest cosine of two", "cpu: directions, mean of the entries"} <= set(failed)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["values", "derivatives"])
def test_unweighted_batches_are_caught(monkeypatch, which):
    def sums(self, total):
        batches = [torch.stack([total(self.model(b.inputs), b) / b.size for b in each]) for each in self._batches]
        return torch.stack([each.mean(0) * n for each, n in zip(batches, self.sizes.tolist(), strict=True)])

    original = Landscape._terms

    def terms(self):
        found = list(original(self))
        sizes = [len(inputs) for inputs, *_ in found]
        return ((x, total, size * len(found)) for (x, total, _), size in zip(found, sizes, strict=True))

    if which == "values":
        monkeypatch.setattr(Landscape, "_sums", sums)
        assert "cpu: softmax, loss" in failures(selftest._values)
    else:
        monkeypatch.setattr(Landscape, "_terms", terms)
        failed = failures(selftest._values, selftest._spectra)
        assert {"cpu: softmax, gradient", "cpu: softmax, Hessian operator", "cpu: softmax, top eigenvalues"} <= set(
            failed
        )
        assert any("trace" in name for name in failed)


@pytest.mark.slow
def test_a_halved_trace_is_caught(monkeypatch):
    original = trace._products_of
    monkeypatch.setattr(trace, "_products_of", lambda *args, **kwargs: original(*args, **kwargs) / 2)
    failed = failures(selftest._spectra, selftest._coverage)
    assert "cpu: quadratic, trace (Hutchinson)" in failed and "cpu: trace, 90% intervals that contain it" in failed


@pytest.mark.slow
def test_a_swapped_sign_is_caught(monkeypatch):
    original = Curvature.__matmul__
    monkeypatch.setattr(Curvature, "__matmul__", lambda self, vectors: -original(self, vectors))
    failed = failures(selftest._values, selftest._spectra)
    for name in ("Hessian operator", "top eigenvalues", "trace (deflated)", "density, moment 1"):
        assert f"cpu: softmax, {name}" in failed


@pytest.mark.parametrize("seeding", ["none at all", "one for all"])
def test_a_seed_that_does_not_seed_is_caught(monkeypatch, seeding):
    chance = np.random.default_rng(0)

    def generator(*names, device="cpu"):
        return torch.Generator(device).manual_seed(7 if seeding == "one for all" else int(chance.integers(2**40)))

    for module in (seeds, perturbations, krylov):
        monkeypatch.setattr(module, "generator", generator)
    failed = failures(selftest._randomness)
    told = "one seed twice, difference" if seeding == "none at all" else "two seeds differ"
    assert {f"cpu: {name}, {told}" for name in ("sphere", "trace", "density", "surface")} <= set(failed)


def test_intervals_that_are_too_narrow_are_caught(monkeypatch):
    from flatlab.results.estimate import Estimate

    original = Estimate.half_width
    monkeypatch.setattr(Estimate, "half_width", lambda self, level=0.95: original(self, level) / 4)
    assert len(failures(selftest._coverage)) == 2


@pytest.mark.slow
def test_a_search_that_stops_too_early_is_caught(monkeypatch):
    monkeypatch.setattr(eigenvalues._Search, "_settled", lambda self: self.krylov.size >= self.need)
    assert "cpu: quadratic, top eigenvalues" in failures(selftest._spectra)


@pytest.mark.slow
def test_a_density_without_its_weights_is_caught(monkeypatch):
    original = spectrum.SpectralDensity

    def unweighted(**fields):
        flat = tuple(np.full(len(nodes), 1 / len(nodes)) for nodes in fields["nodes"])
        return original(**{**fields, "weights": flat})

    monkeypatch.setattr(density, "SpectralDensity", unweighted)
    assert "cpu: softmax, density, moment 1" in failures(selftest._spectra)


def test_a_fault_is_a_line_and_no_traceback(monkeypatch, capfd):
    def broken(where):
        yield selftest.Check("fine", 1.0, 1.0, 0.0)
        raise RuntimeError("something\nlong")

    monkeypatch.setattr(selftest, "GROUPS", (broken,))
    assert commandline.call("selftest") == 1
    out = capfd.readouterr().out
    assert "RuntimeError: something" in out and "long" not in out and "Traceback" not in out and "2 of 4" in out
    assert commandline.call("selftest", "--json") == 1
    rows = commandline.documented("selftest", capfd.readouterr().out)
    assert [row["passed"] for row in rows] == [True, False] * 2
