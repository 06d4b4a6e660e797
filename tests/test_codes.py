"""Flatness on the quantization grid: moves stay on it, and F is that of all neighbours counted one by one."""

import itertools
import json

import cases
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from commandline import call
from stores import PLACE, QT, spec, trained
from torch import nn

import flatlab
from flatlab.errors import UserError
from flatlab.landscape.codes import Neighbours
from flatlab.metrics.flatness.codes import SHARES
from flatlab.quant.attach import attach_each, bake, quantized_layers
from flatlab.quant.inq import INQ
from flatlab.quant.lsq import LSQ
from flatlab.seeds import generator
from flatlab.specs.measurements import SphereSpec

GRIDS = {
    "signed, channels": {"bits": 2},
    "signed, tensor": {"bits": 2, "granularity": "tensor"},
    "unsigned": {"bits": 2, "signed": False},
    "powers of two": {"bits": 3, "grid": "power-of-two"},
}


def tiny(**options):
    """A network of six quantized weights, some at the ends of their range, its landscape and its neighbours."""
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    rng = generator("codes", "tiny")
    with torch.no_grad():
        for each in network.parameters():
            each.copy_(torch.randn(each.shape, generator=rng))
        network[0].weight[0, 0], network[0].weight[1, 1] = 4.0, -4.0
    inputs, labels = torch.randn(24, 3, generator=rng), torch.randint(0, 3, (24,), generator=rng)
    kind = INQ if "grid" in options else LSQ
    attach_each(network, lambda name, weight, axis: kind(weight, axis=axis, **options), outside="2")
    (layer,) = quantized_layers(network).values()
    if kind is INQ:
        layer.quantizer.advance(layer.latent, 1.0)
    codes, levels = layer.quantizer.codes(layer.latent), layer.quantizer.levels
    found = flatlab.code_neighbours(network)
    bake(network.eval())
    return flatlab.Landscape(network, [(inputs, labels)], F.cross_entropy, params="0.weight"), found, (codes, levels)


def counted(landscape, neighbours, share):
    """F by all combinations of moves, each with its probability: shares no code with the draws."""
    down, up = (each.flatten().tolist() for each in neighbours["0.weight"])
    ways = []
    for d, u in zip(down, up, strict=True):
        sides = [side for side in (d, u) if side]
        ways.append([(0.0, 1 - share), *[(side, share / len(sides)) for side in sides]])
    value = 0.0
    for chosen in itertools.product(*ways):
        move = torch.tensor([each for each, _ in chosen])
        value += np.prod([p for _, p in chosen]) * landscape.evaluate(landscape.point + move).loss
    return value - landscape.evaluate().loss


@pytest.fixture(params=GRIDS)
def grid(request):
    return tiny(**GRIDS[request.param])


def test_moves_are_of_one_code_and_stay_in_the_range(grid):
    landscape, named, (codes, (low, high)) = grid
    assert ((codes == low) | (codes == high)).any()
    near = Neighbours.of(landscape, named)
    values = {float(w) for w in landscape.point}
    values |= {float(d + w) for side in named["0.weight"] for d, w in zip(side.flatten(), landscape.point, strict=True)}
    counts = np.zeros(2)
    for k in range(200):
        one, other = near.moves(0.5, 0, k)
        counts += [(one != 0).float().mean(), ((one != 0) == (other != 0)).all()]
        assert {float(each) for each in landscape.point + one} <= values
        inside = (near.down != 0) & (near.up != 0) & (one != 0)
        assert (one[inside] * other[inside] < 0).all()  # the other side
        assert torch.equal(one[~inside], other[~inside])  # which there is none of at an end
    assert counts[1] == 200 and abs(counts[0] / 200 - 0.5) < 0.06
    small, large = (near.moves(share, 3, 1)[0] for share in (0.2, 0.7))
    assert torch.equal(small[small != 0], large[small != 0])
    lengths = [float(near.moves(0.25, 0, k)[0].square().sum()) for k in range(2000)]
    assert np.mean(lengths) == pytest.approx(near.radius(0.25) ** 2, abs=4 * np.std(lengths) / 2000**0.5)


@pytest.mark.parametrize("paired", [False, True])
def test_the_estimate_is_that_of_all_neighbours_counted_one_by_one(grid, paired):
    landscape, named, _ = grid
    near, share = Neighbours.of(landscape, named), 1 / 3
    truth = counted(landscape, named, share)
    options = {"block_size": 8, "rel_error": 0.0, "abs_error": 0.02} if paired else {"num_samples": 200}
    found = flatlab.code_flatness(landscape, named, radii=[0.0, near.radius(share)], **options)
    assert found.value[0] == 0 and abs(found.value[1] - truth) < 4 * found.stderr[1]
    assert 0 < found.stderr[1] < 0.04
    assert found.paired[1] is paired and found.blocks[1] == (3 if paired else 1)
    assert found.remarks[0] == "By one code up or down move, by radius, 0.00%, 33.33% of the weights."


def test_the_interval_holds_the_truth_as_often_as_it_says():
    landscape, named, _ = tiny(**GRIDS["signed, channels"])
    share = 1 / 2
    truth, radius = counted(landscape, named, share), Neighbours.of(landscape, named).radius(share)
    held = 0
    for seed in range(40):
        low, high = flatlab.code_flatness(landscape, named, radii=radius, num_samples=30, seed=seed).interval()
        held += bool(low[0] <= truth <= high[0])
    assert held >= 33  # of 40 at 95 %: fewer has a probability of 0.3 %


def test_a_quadratic_has_its_closed_form():
    hessian = torch.diag(torch.linspace(1.0, 3.0, 50, dtype=torch.float64)) + 0.1
    landscape = cases.Quadratic(hessian).landscape()
    step = torch.linspace(0.5, 2.0, 50, dtype=torch.float64)
    found = flatlab.code_flatness(landscape, {"w": (-step, step)}, num_samples=200)
    expected = np.array(SHARES) / 2 * float((hessian.diag() * step**2).sum())
    assert (np.abs(found.value - expected) < 4 * found.stderr).all() and (found.stderr < 0.15 * expected).all()
    assert found.radii == pytest.approx([(share * float((step**2).sum())) ** 0.5 for share in SHARES])


def test_what_has_no_neighbours_is_refused():
    landscape, named, _ = tiny(bits=2)
    far = Neighbours.of(landscape, named).radius(1.0) * 1.01
    with pytest.raises(UserError, match=r"^radii must be at most [\d.]+ on the grid, where every weight moves by one"):
        flatlab.code_flatness(landscape, named, radii=far)
    with pytest.raises(UserError, match=r"^The neighbours must be what `code_neighbours"):
        flatlab.code_flatness(landscape, landscape.model)
    with pytest.raises(UserError, match=r"^No parameter of the landscape has a neighbour on a grid: let quantized"):
        flatlab.code_flatness(landscape, {"other": named["0.weight"]})
    with pytest.raises(UserError, match=r"^0\.weight has the shape \(2, 3\), and its neighbours \(3, 2\): take both"):
        flatlab.code_flatness(landscape, {"0.weight": tuple(each.T for each in named["0.weight"])})
    with pytest.raises(UserError, match=r"^radii must be numbers or \"auto\", got 'some'"):
        flatlab.code_flatness(landscape, named, radii="some")
    with pytest.raises(UserError, match=r"^The network has no quantized weights: pass it before `bake`"):
        flatlab.code_neighbours(landscape.model)
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    attach_each(network, lambda name, weight, axis: INQ(weight, axis=axis), outside="1")
    with pytest.raises(UserError, match=r"^0\.weight is not completely on its grid in this checkpoint, as INQ is"):
        flatlab.code_neighbours(network)


def test_a_run_is_measured_on_its_grid(tmp_path, capsys):
    run = trained(tmp_path, QT).run(QT)
    measurement = SphereSpec.make(radii="auto", num_samples=3, images=8, space="codes")
    flatlab.measure_run(run, measurement, PLACE)
    found = run.result(measurement)
    assert (found.radii / found.radii.max()) ** 2 == pytest.approx(SHARES)
    network = flatlab.network_of(run, "selected", PLACE)
    around = flatlab.landscape_of(run, measurement, PLACE)
    named = flatlab.code_neighbours(network)
    assert set(named) == {"features.0.weight", "features.4.weight", "features.8.weight"}
    again = flatlab.code_flatness(around, named, num_samples=3)
    assert np.array_equal(again.samples, found.samples)
    with pytest.raises(UserError, match=r"^Moves on the grid are not normalised, got normalisation='filter'"):
        flatlab.measure_run(run, measurement.replace(normalisation="filter"), PLACE)
    options = ("--space", "codes", "--images", 8, "--store", tmp_path, "--out", tmp_path)
    assert call("flatness", QT.digest, *options, "--normalisation", "filter") == 2
    assert "--normalisation does nothing with --space codes" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_on_the_grid_what_lies_on_one(tmp_path, capsys):
    trained(tmp_path, erm := spec())
    store = trained(tmp_path, QT)
    options = ("--space", "codes", "--images", 8, "--store", tmp_path, "--out", tmp_path)
    assert call("flatness", QT.digest, *options, "--samples", 4, "--json") == 0
    rows = pd.DataFrame(json.loads(capsys.readouterr().out))
    assert (rows["radius"] ** 2 / rows["radius"].max() ** 2).tolist() == pytest.approx(SHARES)
    assert (rows["low"] <= rows["value"]).all() and rows["value"].iloc[-1] > 0
    (measured,) = store.run(QT).measurements()
    assert measured.spec.space == "codes"
    assert call("flatness", erm.digest, *options) == 2
    assert "--space codes needs weights on a grid" in capsys.readouterr().err
