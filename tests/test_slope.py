"""The slope at w: its size against autograd, and the sentences that rest on it."""

import cases
import numpy as np
import pytest
import torch
from cases import in_blocks, network
from torch import nn

from flatlab import seeds
from flatlab.landscape import Landscape
from flatlab.metrics import slope
from flatlab.metrics.sentences import remarks, verdict
from flatlab.metrics.sphere import sphere_flatness

RADII = np.array([0.0, 0.5, 1.0, 2.0])


class Tilted(nn.Module):
    """Loss of image i: (g + e_i)'w + k |w|^2 / 2, tilted by g in the mean, at w = 0."""

    def __init__(self, tilt, size=40):
        super().__init__()
        rng = seeds.generator("tilted")
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.g = tilt * nn.functional.normalize(torch.randn(size, generator=rng, dtype=torch.float64), dim=0)

    def forward(self, noise):
        return noise @ self.w + self.g @ self.w + self.w.square().sum() / 2


def tilted(tilt, strata=("all",), count=128):
    rng = seeds.generator("tilted", "noise")
    data = {}
    for name in strata:
        noise = torch.randn(count, 40, generator=rng, dtype=torch.float64)
        data[name] = [(noise - noise.mean(0), torch.zeros(count))]  # steep on each image, and flat in the mean
    return Landscape(Tilted(tilt).eval(), data, lambda outputs, _: outputs)


def test_products_are_unbiased_for_the_gradient():
    """Against autograd: the mean product is |g|^2 / P, within its standard error, over 40 seeds."""
    landscape = network()
    truth = float(landscape.gradient().square().sum()) / landscape.num_params
    found = np.array([slope.slopes(landscape, 1e-3, seed=seed).mean() for seed in range(40)])
    assert abs(found.mean() - truth) < 3 * found.std(ddof=1) / np.sqrt(40)
    assert not np.array_equal(slope.slopes(landscape, 1e-3, seed=0), slope.slopes(landscape, 1e-3, seed=1))


def test_strata_have_slopes_of_their_own():
    case = cases.make("mlp").double()
    pairs = case.batches([12, 12])
    landscape = Landscape(case.model, {"a": pairs[:1], "b": pairs[1:]}, case.loss)
    alone = [Landscape(case.model, [pair], case.loss).gradient() for pair in pairs]
    truth = torch.stack(alone) @ torch.stack(alone).T / landscape.num_params
    found = np.stack([slope.slopes(landscape, 1e-4, seed=seed).mean(axis=0) for seed in range(60)])
    errors = found.std(axis=0, ddof=1) / np.sqrt(60)
    assert np.all(np.abs(found.mean(axis=0) - truth.numpy()) < 3.5 * errors)


def test_what_is_spent_on_slopes_is_what_was_forwarded():
    landscape, seen = network(), []
    landscape.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    slope.slopes(landscape, 0.1, seed=0)
    assert sum(seen) == slope.price(landscape, seed=0) == 4 * 16 * slope.DIRECTIONS


@pytest.mark.parametrize("measure", ["blocks", "crossed", "piloted"])
def test_a_slope_that_dominates_is_told_and_a_minimum_is_not_slandered(measure):
    def measured(landscape):
        if measure == "blocks":
            return in_blocks(landscape, RADII, 8, errors=(0.2, 0), budget=1e6)
        return sphere_flatness(
            landscape, RADII, **({"num_samples": 60} if measure == "crossed" else {"rel_error": 0.1})
        )

    assert measured(tilted(0.0)).remarks == []
    (sentence,) = measured(tilted(8.0)).remarks
    assert sentence.startswith("w is not near a minimum of these data: up to radius 1 the slope outweighs")


def test_a_subset_of_strata_speaks_for_itself():
    model = Tilted(0.0).eval()
    model.g = torch.zeros(40, dtype=torch.float64)
    rng = seeds.generator("tilted", "strata")
    noise = torch.randn(128, 40, generator=rng, dtype=torch.float64)
    flat, steep = noise - noise.mean(0), noise - noise.mean(0) + 1.0  # a gradient of length sqrt(40)
    data = {"seen": [(flat, torch.zeros(128))], "unseen": [(steep, torch.zeros(128))]}
    found = in_blocks(Landscape(model, data, lambda outputs, _: outputs), RADII, 8, errors=(0.2, 0), budget=1e6)
    assert found.of("seen").remarks == [] and len(found.of("unseen").remarks) == 1


def test_what_is_not_finite_is_told_with_its_share():
    rises = [np.zeros(4), np.array([1.0, np.inf, 2.0, np.nan]), np.ones(4), np.full(4, np.inf)]
    (sentence,) = remarks(RADII, rises, [1] * 4, None)
    assert sentence == "Not finite is the loss of 50.0% at radius 0.5, 100.0% at radius 2: F is not defined there."


def test_a_verdict_names_radii():
    low, high = np.array([0.0, -2.0, -1.0, 1.0]), np.array([0.0, -1.0, 1.0, 2.0])
    assert verdict(low, high, RADII, ("A", "B")) == (
        "A is flatter up to radius 0.5; not distinguishable from 1 to 1; B is flatter from radius 2 on"
    )
