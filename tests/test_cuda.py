"""On an NVIDIA GPU: the same numbers as on the CPU, up to rounding; skipped where there is none."""

import copy
import os
import subprocess
import sys

import commandline
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatlab import Hessian, Landscape, compare_flatness, hessian_spectrum, hessian_trace, sphere_flatness
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.models.networks import build_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class Net(nn.Module):
    """Plain, depthwise and pointwise convolutions with BatchNorm, wide enough for the kernels of tensor cores."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU6()]
        layers += [nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.BatchNorm2d(64), nn.ReLU6(), nn.Conv2d(64, 64, 1)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 7))

    def forward(self, x):
        return self.body(x)


def problem(count=200, *, seed=0, size=16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = Net().eval(), torch.randn(count, 3, size, size)
        targets = torch.randint(7, (count,))
    return model, inputs, targets


def landscape(device, dtype=torch.float32, *, count=200, **kwargs):
    model, inputs, targets = problem(count)
    at = {"device": device, "dtype": dtype}
    return Landscape(model.to(**at), [(inputs.to(**at), targets.to(device))], F.cross_entropy, **kwargs)


def test_the_selftest_passes_on_both_devices(capfd):
    assert commandline.call("selftest") == 0
    out = capfd.readouterr().out
    assert "cuda float64" in out and "cuda float32" in out


@pytest.mark.parametrize("fast", [False, True])
def test_losses_and_derivatives_are_those_of_float64_whatever_torch_was_allowed(fast):
    word = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if fast else "highest")
        exact, ours = landscape("cpu", torch.float64), landscape("cuda")
        assert ours.base_loss == pytest.approx(exact.base_loss, rel=2e-6)
        v = draw_direction(exact, 0, 0)
        pairs = [
            (exact.gradient(), ours.gradient()),
            (exact.hvp(v), ours.hvp(v.float().cuda())),
            (Hessian(exact) @ v, Hessian(ours) @ v.float().cuda()),
        ]
        for truth, found in pairs:
            assert (found.cpu().double() - truth).norm() <= 1e-4 * truth.norm()
    finally:
        torch.set_float32_matmul_precision(word)


def test_directions_are_drawn_on_the_device_of_length_one_and_shared_by_models():
    ours, other = landscape("cuda"), landscape("cuda", torch.float64)
    first = draw_direction(ours, 3, 1)
    assert first.is_cuda and float(first.double().norm()) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(draw_direction(other, 3, 1).float(), first)
    assert abs(float(first @ draw_direction(ours, 3, 2))) < 0.1


@pytest.mark.parametrize("normalisation", ["none", "filter"])
def test_flatness_agrees_with_that_on_the_cpu_in_float64_within_the_intervals(normalisation):
    radii = [0.3, 1.0] if normalisation == "none" else [0.05, 0.2]
    exact = sphere_flatness(landscape("cpu", torch.float64), radii, rel_error=0.01, normalisation=normalisation)
    ours = sphere_flatness(landscape("cuda"), radii, rel_error=0.01, normalisation=normalisation)
    assert (np.abs(ours.value - exact.value) < 4 * np.hypot(ours.stderr, exact.stderr)).all()


def test_the_model_is_restored_bit_by_bit_and_two_calls_give_the_same(untouched):
    model, inputs, targets = problem()
    model = model.cuda()
    with untouched(model):
        around = Landscape(model, [(inputs.cuda(), targets.cuda())], F.cross_entropy)
        first = sphere_flatness(around, [0.5], num_samples=4)
        again = sphere_flatness(around, [0.5], num_samples=4)
    assert again.value == pytest.approx(first.value, rel=1e-5)


def test_a_compiled_model_has_the_same_landscape():
    model, inputs, targets = problem()
    model, data = model.double().cuda(), [(inputs.double().cuda(), targets.cuda())]  # kernels round differently
    plain = Landscape(model, data, F.cross_entropy)
    compiled = Landscape(torch.compile(copy.deepcopy(model)), data, F.cross_entropy)
    one, other = (sphere_flatness(each, [0.5, 1.0], num_samples=6) for each in (plain, compiled))
    assert other.value == pytest.approx(one.value, rel=1e-6)


def test_eigenvalues_trace_and_comparison_agree_with_those_on_the_cpu():
    exact, ours = landscape("cpu", torch.float64, count=24), landscape("cuda", count=24)
    assert hessian_spectrum(ours, k=2).eigenvalues == pytest.approx(hessian_spectrum(exact, k=2).eigenvalues, rel=1e-3)
    one, other = (hessian_trace(each, rel_error=0.1, budget=100).trace for each in (ours, exact))
    assert one.value == pytest.approx(other.value, rel=1e-3)  # the same vectors, drawn on the host
    found = compare_flatness(ours, landscape("cuda", count=24), [0.5])
    assert np.abs(found.value).max() < 1e-5  # the same model: pairs share directions and images


def test_small_blocks_of_a_large_network_run_on_the_gpu():
    model = build_network("mobilenet_v2", num_classes=7).eval().cuda()
    inputs, targets = torch.randn(300, 3, 64, 64, device="cuda"), torch.randint(7, (300,), device="cuda")
    found = sphere_flatness(Landscape(model, [(inputs, targets)], F.cross_entropy), [0.5], rel_error=0.1)
    assert np.isfinite(found.value).all() and next(model.parameters()).is_cuda


@pytest.mark.timeout(600)
def test_every_analysis_runs_on_the_gpu(tmp_path):
    folders = ["--store", tmp_path / "runs", "--out", tmp_path / "figures"]
    options = ["--setting", "smoke", "--device", "cuda", "--workers", str(max(2, (os.cpu_count() or 2) - 2))]
    done = subprocess.run(
        [sys.executable, "-m", "flatlab", "reproduce", "all", *options, *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [*tmp_path.glob("runs/*/provenance.json")]
    assert runs and all('"device": "cuda' in each.read_text() for each in runs)
