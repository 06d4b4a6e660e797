"""The worst direction on a sphere, against closed forms."""

import cases
import numpy as np
import pytest
import spectra
import torch

from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.metrics.flatness.worst import worst_rise


def matrix(size=12):
    return spectra.rotated(np.linspace(-1.0, 4.0, size), "worst")


def test_on_a_quadratic_it_is_the_largest_eigenvalue():
    found = worst_rise(cases.Quadratic(matrix()).landscape(), [0.5, 2.0], restarts=3, steps=60)
    exact = np.array([0.5, 2.0]) ** 2 * 4.0 / 2
    assert found.value == pytest.approx(exact, rel=0.01)
    assert np.all(found.value <= exact * (1 + 1e-6))
    assert np.all(found.spread >= 0)


def test_on_a_slope_it_is_the_slope():
    slope = torch.arange(1.0, 6.0, dtype=torch.float64)
    flat = torch.zeros(5, 5, dtype=torch.float64)
    found = worst_rise(cases.Quadratic(flat, slope=slope).landscape(), 2.0, restarts=1, steps=1)
    assert found.value == pytest.approx(2.0 * slope.norm().item(), rel=1e-6)


def test_it_is_never_below_the_mean(untouched):
    case = cases.make("conv_bn")
    landscape = case.landscape()
    with untouched(case.model):
        worst = worst_rise(landscape, [0.3], restarts=2, steps=5)
    mean = sphere_flatness(landscape, [0.3], num_samples=20)
    assert worst.value[0] > mean.value[0]


def test_the_seed_names_the_starts():
    landscape = cases.Quadratic(matrix()).landscape()
    one, same, other = (worst_rise(landscape, 1.0, restarts=3, steps=2, seed=seed).rises for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
