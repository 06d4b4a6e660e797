"""Products of float32 are computed in float32, whatever torch was told for speed, and its settings come back."""

import pytest
import torch
import torch.nn.functional as F
from cases import CUTS, make

from flatlab import Landscape, sphere_flatness
from flatlab.tensors.precision import KERNELS, _word, float32_in_full


def settings():
    return _word(), [kernel.fp32_precision for kernel in KERNELS]


@pytest.fixture(autouse=True)
def restored():
    word, before = settings()
    yield
    torch.set_float32_matmul_precision(word or "highest")
    for kernel, precision in zip(KERNELS, before, strict=True):
        kernel.fp32_precision = precision


def fast():
    """Allow each kernel the fastest product that it has."""
    torch.set_float32_matmul_precision("medium")
    for kernel in KERNELS:
        kernel.fp32_precision = "tf32"


@pytest.mark.parametrize("setting", [lambda: None, fast, lambda: torch.set_float32_matmul_precision("high")])
def test_settings_are_ieee_inside_and_come_back_also_after_an_exception(setting):
    setting()
    before = settings()
    with pytest.raises(ZeroDivisionError), float32_in_full():
        assert settings() == ("highest", ["ieee"] * len(KERNELS))
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
        _ = 1 / 0
    assert settings() == before


def test_no_value_and_no_derivative_of_a_landscape_is_computed_with_rounded_factors():
    case, seen = make("conv_bn"), set()

    def loss(outputs, targets):
        seen.add(settings()[0])
        seen.update(settings()[1])
        return F.cross_entropy(outputs, targets)

    fast()
    landscape = Landscape(case.model, case.batches(CUTS["uneven"]), loss)
    landscape.evaluate(), landscape.gradient(), landscape.hvp(landscape.point)
    sphere_flatness(landscape, [0.1], num_samples=2)
    assert seen == {"highest", "ieee"}
