"""Comparisons of two models along common rays."""

import dataclasses

import cases
import numpy as np
import pytest
import torch

from flatlab.errors import UserError
from flatlab.metrics.compare import paired_difference
from flatlab.metrics.sphere import sphere_flatness


def test_pairs_share_their_rays():
    case, other = cases.make("mlp"), cases.make("mlp")
    with torch.no_grad():
        other.model[2].weight.mul_(1.1)
    a, b = (sphere_flatness(each.landscape(), [0.5, 1.0], num_samples=20) for each in (case, other))
    pair = paired_difference(a, b)
    assert pair.value == pytest.approx(a.value - b.value)
    assert np.all(pair.stderr < 0.5 * np.hypot(a.stderr, b.stderr))
    assert pair.cost == a.cost + b.cost and pair.to_frame().shape == (2, 6)


def test_pairs_without_common_rays_are_refused():
    a = cases.stratified()
    assert paired_difference(a, a.of("a")).value == pytest.approx(a.value - a.of("a").value)
    for change in ({"seed": 1}, {"normalisation": "filter"}, {"num_params": 3}, {"radii": a.radii * 2}):
        with pytest.raises(UserError, match=f"but {next(iter(change))} differs"):
            paired_difference(a, dataclasses.replace(a, **change))
    with pytest.raises(UserError, match=r"but their numbers differ \(\[6, 6\] and \[4, 4\]\)"):
        paired_difference(a, cases.stratified(4))
