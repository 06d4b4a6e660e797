"""What a measured value cannot know of itself is said: images not evaluated, steps that weights cannot hold."""

import numpy as np
import pytest
import torch
from torch import nn

from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.metrics.flatness.worst import worst_rise


class Bowl(nn.Module):
    """Losses x |w - c|^2 / 2, computed in float64 whatever the weights' type."""

    def __init__(self, count, dtype=torch.float32, size=1.0):
        super().__init__()
        weights = (size * torch.randn(count, generator=torch.Generator().manual_seed(0))).to(dtype)
        self.weight = nn.Parameter(weights)
        self.register_buffer("minimum", weights.double())

    def forward(self, inputs):
        return inputs[:, 0].double() * (self.weight.double() - self.minimum).square().sum() / 2


def itself(outputs, targets):
    return outputs


def landscape(model, heights):
    return Landscape(model.eval(), [(heights[:, None], torch.zeros(len(heights)))], itself)


@pytest.mark.parametrize(
    ("dtype", "size", "wider"), [(torch.bfloat16, 1.0, "float32"), (torch.float32, 1e4, "float64")]
)
def test_steps_that_the_weights_cannot_hold_are_named(dtype, size, wider):
    around = landscape(Bowl(200, dtype, size), torch.ones(8))
    found = sphere_flatness(around, [1e-3, 100.0], num_samples=16)
    assert found.value[0] != pytest.approx(0.5e-6, rel=0.1)  # the rise at 0.001 is that of other points
    assert found.value[1] == pytest.approx(5e3, rel=0.02)
    (said,) = found.remarks
    assert "cannot hold steps of length 0.001 (" in said and wider in said and "100" not in said
    with pytest.raises(UserError, match="cannot hold steps of length 0.001"):
        worst_rise(around, [1e-3], restarts=1, steps=1)


def test_steps_that_are_held_are_not():
    around = landscape(Bowl(200), torch.ones(8))
    assert sphere_flatness(around, [1e-2, 1.0], num_samples=16).remarks == []


def test_what_one_image_of_thousands_does_may_be_missing_and_is_said_to_be():
    heights = torch.full((4000,), 1e-3)
    heights[1234] = 4000.0
    around = landscape(Bowl(100), heights)
    found = sphere_flatness(around, [1.0])
    exact = sphere_flatness(around, [1.0], num_samples=2)
    assert exact.value[0] == pytest.approx(float(heights.double().mean()) / 2, rel=1e-4)
    assert found.value[0] == pytest.approx(exact.value[0], rel=0.1) or any("may be missing" in r for r in found.remarks)
    assert exact.remarks == []


def test_after_a_round_over_all_images_nothing_is_missing():
    around = landscape(Bowl(100), torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5)
    found = sphere_flatness(around, [1.0])
    assert np.isfinite(found.value).all() and not any("missing" in each for each in found.remarks)


def test_parameters_without_elements_dilute_nothing():
    model = Bowl(100)
    model.empty = nn.Parameter(torch.empty(0, 4))
    assert not landscape(model, torch.ones(8)).remarks


@pytest.mark.parametrize(("dtype", "said"), [(torch.float32, True), (torch.float64, False)])
def test_a_loss_too_coarse_for_its_differences_is_named(dtype, said):
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype).eval()
    data = [(x.to(dtype), (300_000 + 50_000 * x[:, :1]).to(dtype))]  # prices, not scaled
    around = Landscape(model, data, nn.functional.mse_loss)
    found = sphere_flatness(around, [0.0, 0.05], num_samples=40)
    if dtype == torch.float32:
        around.check_curvature()  # computes the loss of a few samples in float64, too
    assert around.resolution == pytest.approx(float(around.base_loss[0]) * torch.finfo(dtype).eps)
    assert (
        any("apart in its dtype, more than the standard error at radius 0.05:" in each for each in found.remarks)
        == said
    )
