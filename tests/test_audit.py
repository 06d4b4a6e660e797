"""Rescalings that change nothing: which pairs are found and refused, that the function stays, which numbers move."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stores import refuses
from torch import nn

from flatlab import build_network
from flatlab.landscape.landscape import Landscape
from flatlab.metrics import scale_audit as module
from flatlab.metrics.rescaling import find_pairs, rescaled
from flatlab.metrics.scale_audit import scale_audit
from flatlab.results.scale_audit import Pair


def deviation(model, twin, shape, n=7):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        return float((model(x) - twin(x)).abs().max() / model(x).abs().max())


def test_pairs_of_a_convolutional_network_are_found():
    model = cases.make("conv_bn").model
    pairs, refusals = find_pairs(model)
    assert pairs == [Pair("0", "1", "norm"), Pair("1", "3", "layers"), Pair("3", "4", "norm"), Pair("4", "7", "layers")]
    assert refusals == []


@pytest.mark.parametrize("by", ["layer", "channel"])
def test_the_function_stays_and_the_weights_do_not(by, untouched):
    case = cases.make("conv_bn").double()
    pairs, _ = find_pairs(case.model)
    with untouched(case.model):
        twin = rescaled(case.model, pairs, by=by, seed=1)
    assert deviation(case.model, twin, (1, 8, 8)) < 1e-12
    for name in ("0.weight", "1.weight", "1.running_var", "3.weight", "7.weight"):
        moved = twin.state_dict()[name] / case.model.state_dict()[name]
        assert (moved - 1).abs().max() > 0.01 and moved.min() > 1 / 16.1 and moved.max() < 16.1
    again, other = (rescaled(case.model, pairs, by=by, seed=seed).state_dict() for seed in (1, 2))
    assert torch.equal(again["0.weight"], twin.state_dict()["0.weight"])
    assert not torch.equal(other["0.weight"], twin.state_dict()["0.weight"])


class Functional(nn.Module):
    """Grouped and depthwise convolutions, functions instead of modules, channels that are flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
        self.c, self.d = nn.Conv2d(6, 4, 1, groups=2), nn.Linear(4 * 9, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b(x).relu()
        return self.d(torch.flatten(F.max_pool2d(self.c(x), 2), 1))


@pytest.mark.parametrize("by", ["layer", "channel"])
def test_groups_functions_and_flattened_channels(by):
    model = Functional().double().eval()
    pairs, refusals = find_pairs(model)
    assert [(p.first, p.second) for p in pairs] == [("a", "b"), ("b", "c"), ("c", "d")] and not refusals
    assert deviation(model, rescaled(model, pairs, by=by), (2, 10, 10)) < 1e-12


def chain(activation):
    return nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 3)).eval()


@pytest.mark.parametrize(
    "activation, word",
    [
        (nn.ReLU6(), "cut off at 6"),
        (nn.GELU(), "GELU"),
        (nn.Tanh(), "Tanh"),
        (nn.SiLU(), "SiLU"),
        (nn.LayerNorm(5), "LayerNorm"),
        (nn.Hardtanh(), "cut off"),
    ],
)
def test_what_is_not_homogeneous_is_refused_with_its_reason(activation, word):
    pairs, refusals = find_pairs(chain(activation))
    assert not pairs and len(refusals) == 1 and refusals[0].first == "0"
    assert "positively homogeneous" in refusals[0].reason and word in refusals[0].reason
    landscape = Landscape(chain(activation), cases.make("mlp").batches(), F.cross_entropy)
    refuses(lambda: scale_audit(landscape), "can be rescaled", word)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x + x.relu())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


def test_other_refusals():
    assert "several places" in find_pairs(Residual().eval())[1][0].reason
    _, refusals = find_pairs(cases.make("tied").model)
    assert {each.first for each in refusals} == {"first", "second"} and "used twice" in refusals[0].reason
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=False), nn.ReLU()).eval()
    assert "no factor" in find_pairs(plain)[1][0].reason
    refuses(lambda: find_pairs(Branching()), "torch.fx", "Branching")
    alone = Landscape(nn.Linear(6, 3).eval(), cases.make("mlp").batches(), F.cross_entropy)
    refuses(lambda: scale_audit(alone), "no two layers")
    refuses(lambda: scale_audit(cases.make("conv_bn").landscape(), most=1.0), "most must be > 1")


@pytest.mark.parametrize("name", ["digits-cnn", "mobilenet_v2", "resnet18"])
def test_real_networks(name):
    channels = 1 if name == "digits-cnn" else 3
    model = build_network(name, num_classes=5, in_channels=channels).eval()
    pairs, refusals = find_pairs(model)
    kinds = [pair.kind for pair in pairs]
    assert kinds.count("norm") > 2 and all(each.reason for each in refusals)
    if name == "mobilenet_v2":
        assert any("ReLU6" in each.reason for each in refusals)
    for by in ("layer", "channel"):
        assert deviation(model, rescaled(model, pairs, by=by), (channels, 32, 32), n=2) < 1e-3


@pytest.mark.slow
def test_the_audit_ranks_measures_by_what_theory_says(untouched):
    case = cases.make("conv_bn").double()
    landscape = case.landscape([20, 4])
    with untouched(case.model):
        found = scale_audit(landscape, num_samples=6, seed=3)
    assert (found.deviation < 1e-12).all() and len(found.pairs) == 4
    ratio = dict(zip(found.measures, found.ratio.T, strict=True))
    assert ratio["sphere, by parameter (adaptive)"] == pytest.approx(1, rel=1e-6)
    assert ratio["sphere, by filter"][0] == pytest.approx(1, rel=1e-6)
    assert ratio["sphere, by layer"][0] == pytest.approx(1, rel=1e-6)
    assert abs(ratio["sphere, by filter"][1] - 1) > 0.01  # columns of the next layer: no filter is scaled as a whole
    for name in ("sphere, raw", "trace", "top eigenvalue"):
        assert np.abs(ratio[name] - 1).max() > 0.2
    assert found.ranking[0] == "sphere, by parameter (adaptive)"
    frame = found.to_frame()
    assert frame["measure"].tolist() == found.ranking and frame["invariant"].sum() == 1
    twin = landscape.around(rescaled(case.model, list(found.pairs), by="layer", seed=3))
    dense = [np.linalg.eigvalsh(each.numpy()) for each in map(hessian_of(case), (landscape, twin))]
    assert ratio["top eigenvalue"][0] == pytest.approx(dense[1][-1] / dense[0][-1], rel=0.02)
    ax = found.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == found.ranking and "after / before" in ax.get_xlabel()


def hessian_of(case):
    return lambda landscape: cases.Case(landscape.model, case.inputs, case.targets).dense_hessian(landscape.point)


def test_a_rescaling_that_changes_the_function_is_refused(monkeypatch):
    landscape = cases.make("conv_bn").landscape()

    def wrong(model, pairs, **kwargs):
        return rescaled(model, pairs[:1], **kwargs).apply(
            lambda m: m.weight.data.mul_(2) if type(m) is nn.Linear else m
        )

    monkeypatch.setattr(module, "rescaled", wrong)
    refuses(lambda: scale_audit(landscape), "must not change the outputs")
