"""Curvature as units: what is kept is not made again, and how products are made is part of what is kept."""

import cases
import numpy as np
import pytest

from flatlab.derivatives.operators import Hessian
from flatlab.metrics.curvature import resumable
from flatlab.metrics.curvature.density import spectral_density
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.resumable import KeptHessian
from flatlab.metrics.curvature.trace import hessian_trace
from flatlab.metrics.scale_audit import scale_audit
from flatlab.metrics.trace_check import trace_check


class Drawer:
    """Keeps units in memory; after so many new ones the process dies."""

    def __init__(self, lives=10**6):
        self.kept, self.lives = {}, lives

    def __call__(self, units):
        for name, make in units:
            if name not in self.kept:
                made = make()
                if not self.lives:
                    raise KeyboardInterrupt
                self.lives -= 1
                self.kept[name] = made
            yield self.kept[name]


def around():
    return cases.make("conv_bn").double().landscape([20, 4])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_the_units_are_the_measurements_of_the_kept_method(method):
    landscape, drawer = around(), Drawer()
    drawer.kept["method"] = np.array([method == "forward"], float)
    hessian, operator = KeptHessian(landscape, drawer), Hessian(landscape, method=method)
    assert hessian.operator().method == method
    trace, expected = hessian.trace(rel_error=0.5, seed=3), hessian_trace(operator, rel_error=0.5, seed=3)
    assert np.array_equal(trace.vectors, expected.vectors, equal_nan=True) and (trace.exact == expected.exact).all()
    same = ("basis", "rel_error", "stopped", "seed", "num_params")
    assert [getattr(trace, name) for name in same] == [getattr(expected, name) for name in same]
    assert trace.cost.hvps == expected.cost.hvps
    density = hessian.density(num_vectors=2, steps=4, seed=3)
    told = spectral_density(operator, num_vectors=2, steps=4, seed=3)
    assert np.array_equal(density.nodes, told.nodes) and np.array_equal(density.weights, told.weights)
    assert (density.cost.hvps, density.floor) == (told.cost.hvps, told.floor)
    top, cost = hessian.top(tol=0.1, seed=3)
    found = hessian_spectrum(operator, k=1, tol=0.1, seed=3)
    assert top == found.eigenvalues[0] and cost.hvps == found.cost.hvps


def measurements():
    return {
        "trace_check": lambda keep: trace_check(around(), radii=[0.3], rel_error=0.5, density=(2, 3), keep=keep),
        "audit": lambda keep: scale_audit(around(), num_samples=2, keep=keep),
    }


@pytest.mark.parametrize("name", ["trace_check", "audit"])
def test_an_interrupted_measurement_resumes_to_the_same_result(name, monkeypatch):
    measure, whole = measurements()[name], Drawer()
    expected = measure(whole).to_frame()
    curved = [unit for unit in whole.kept if unit.endswith(("trace", "top", "method")) or "density" in unit]
    assert len(curved) == {"trace_check": 4, "audit": 9}[name]
    cut = Drawer(lives=2)
    with pytest.raises(KeyboardInterrupt):
        measure(cut)
    cut.lives = 10**6
    # What depends on the time is kept from the first attempt; all else is a function of the seed.
    cut.kept |= {unit: whole.kept[unit] for unit in whole.kept if unit.endswith(("method", "plan"))}
    assert measure(cut).to_frame().equals(expected) and cut.kept.keys() == whole.kept.keys()

    def refused(*args, **kwargs):
        raise AssertionError("a product was made again")

    monkeypatch.setattr(resumable, "Hessian", refused)
    assert measure(whole).to_frame().equals(expected)
