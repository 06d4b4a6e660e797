"""Three ways to one number: on closed forms they agree; where the loss is not what its Hessian says, they do not."""

from dataclasses import replace

import cases
import numpy as np
import pytest
import spectra
import torch
from stores import refuses
from torch import nn

from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature import resumable, trace
from flatlab.metrics.trace_check import trace_check


def bowl(values, name):
    return cases.Quadratic(spectra.rotated(values, name)).landscape()


def test_the_three_agree_on_a_quadratic():
    values = [20.0, 5.0, *np.linspace(0.1, 1.0, 18)]
    found = trace_check(bowl(values, "triangle"), rel_error=0.02)
    for each in found.corners.values():
        assert abs(each.value - sum(values)) <= 4 * each.stderr + 1e-9
    assert found.agrees() and found.quadratic_radius() == found.flatness.radii[-1]
    assert "they agree" in found.verdict() and f"radius {found.flatness.radii[-1]:.3g}" in found.verdict()
    predicted = found.flatness.radii**2 * found.trace.trace.value / 40
    assert predicted == pytest.approx(np.geomspace(1e-3, 1, 7), rel=1e-9)
    assert found.cost.hvps == found.trace.cost.hvps + found.density.cost.hvps and found.cost.forward_passes > 0


def test_the_three_agree_on_softmax_regression():
    landscape, hessian = spectra.softmax_regression()
    found = trace_check(landscape, rel_error=0.01, seed=2)
    for each in found.corners.values():
        assert abs(each.value - hessian.trace().item()) <= 4 * each.stderr + 0.01 * hessian.trace().item()
    assert found.agrees()


class Quartic(nn.Module):
    """L = |w|^2 / 2 + |w|^4 / 4: quadratic up to a radius that is known, F = r^2/2 + r^4/4."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(10, dtype=torch.float64))

    def forward(self, x):
        square = self.w.square().sum()
        return square / 2 + square**2 / 4 + 0 * x


def plain(model):
    return Landscape(model.eval(), [(torch.zeros(2), torch.zeros(2))], lambda outputs, targets: outputs)


def test_the_quadratic_picture_holds_as_far_as_it_does():
    radii = np.array([0.1, 0.2, 0.4, 0.44, 0.46, 0.8])
    found = trace_check(plain(Quartic()), radii=radii, rel_error=1e-3)
    assert found.value == pytest.approx(10 * (1 + radii**2 / 2), rel=1e-6)
    assert found.quadratic_radius() == 0.44  # r^2 / 2 = 0.1 at r = 0.447
    assert found.quadratic_radius(within=0.01) == 0.1


class Kink(nn.Module):
    """L = sum relu(w): flat for autograd, and rising by a kink at any radius."""

    def __init__(self):
        super().__init__()
        self.w, self.relu = nn.Parameter(torch.zeros(12, dtype=torch.float64)), nn.ReLU()

    def forward(self, x):
        return (self.relu(self.w) + 0.05 * self.w.square()).sum() + 0 * x


def test_kinks_are_named_where_they_part_rise_and_trace():
    found = trace_check(plain(Kink()), radii=[0.01, 0.1])
    assert not found.agrees() and found.quadratic_radius() == 0.0
    assert "do not agree (sphere and trace, " in found.verdict() and "has kinks (ReLU)" in found.verdict()
    assert found.corners["sphere"].value > 2 * found.corners["trace"].value


def test_a_halved_trace_is_seen(monkeypatch):
    landscape = bowl([20.0, 5.0, *np.linspace(0.1, 1.0, 18)], "triangle")
    original = trace.hessian_trace

    def halved(*args, **kwargs):
        found = original(*args, **kwargs)
        return type(found)(**{**vars(found), "exact": found.exact / 2, "vectors": found.vectors / 2})

    monkeypatch.setattr(resumable, "hessian_trace", halved)
    found = trace_check(landscape, rel_error=0.02, density=(60, 3))
    assert not found.agrees() and min(high for _, _, high in found.differences().values()) < np.inf
    signs = {pair: low * high > 0 for pair, (_, low, high) in found.differences().items()}
    assert signs == {("sphere", "trace"): True, ("sphere", "density"): False, ("trace", "density"): True}


def test_kinks_do_not_explain_that_trace_and_density_disagree():
    found = trace_check(bowl(np.linspace(0.1, 1.0, 18), "kinks"), radii=[0.1, 0.2])
    off = np.array([0.94 * found.trace.trace.value / found.trace.num_params])
    density = replace(found.density, nodes=(off, off), weights=(np.ones(1), np.ones(1)))
    apart = replace(found, density=density, kinks=("ReLU",))
    wide = np.array([[0.87], [1.07]] * 10)  # so that the sphere agrees with both
    visits = tuple(each.mean() * wide for each in found.flatness.visits)
    plans = tuple(replace(plan, paired=False) for plan in found.flatness.plans)
    apart = replace(apart, flatness=replace(found.flatness, visits=visits, plans=plans, blocks=(1, 1)))
    assert apart.apart() == [("trace", "density")] and apart.quadratic_radius() == 0.2
    assert "do not agree (trace and density)" in apart.verdict() and "ReLU" not in apart.verdict()


@pytest.mark.slow
def test_the_draws_are_independent_and_depend_on_the_seed():
    landscape = bowl(np.linspace(0.1, 3.0, 100), "seeds")  # of up to 84 parameters the trace is exact
    runs = [trace_check(landscape, radii=[0.5], seed=seed) for seed in range(30)]
    corners = np.array([[each.value for each in run.corners.values()] for run in runs])
    assert len(np.unique(corners, axis=0)) == 30
    correlation = np.corrcoef(corners.T)
    assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 0.55  # 3 standard errors of 30 independent runs
    assert np.mean([run.agrees() for run in runs]) > 0.8


def test_mistakes_are_one_sentence():
    flat = cases.Quadratic(torch.zeros(6, 6, dtype=torch.float64)).landscape(check=False)
    refuses(lambda: trace_check(flat), "to choose radii")
    refuses(lambda: trace_check(bowl([1.0, 2.0], "m"), radii=[0.0, 1.0]), "radii must be", "> 0", "got [0.0, 1.0]")
    found = trace_check(bowl([1.0, 2.0], "m"), radii=[0.1], density=(2, 2))
    for read in (found.apart, found.agrees, found.quadratic_radius, found.verdict):
        refuses(lambda read=read: read(level=95), "between 0 and 1", "95")
