"""Straight lines between checkpoints: closed forms, an independent loop, BatchNorm along the line, mistakes."""

import copy

import cases
import numpy as np
import pytest
import torch
from stores import refuses
from torch import nn

from flatlab.landscape.landscape import Landscape
from flatlab.metrics.surfaces.connectivity import connect
from flatlab.metrics.surfaces.directions import given_directions
from flatlab.metrics.surfaces.planes import plane


class Wells(nn.Module):
    """Loss of sample x: (w^2 - 1)^2 (1 + x), two minima at -1 and 1 with a barrier of mean height 1 + mean(x)."""

    def __init__(self, at):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([at], dtype=torch.float64))

    def forward(self, x):
        return (self.w**2 - 1) ** 2 * (1 + x)


def wells(at, x, strata=None):
    data = [(x, x)] if strata is None else {k: [(x[s], x[s])] for k, s in strata.items()}
    return Landscape(Wells(at).eval(), data, lambda outputs, targets: outputs)


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_two_wells_are_apart_by_the_height_between_them():
    x = noise(200)
    found = connect(wells(-1.0, x), wells(1.0, x), grid=21)
    assert found.position == 0.5 and found.places[10] == 0.5
    assert found.losses[:, 0] == pytest.approx(((2 * found.places - 1) ** 2 - 1) ** 2 * (1 + x.mean().item()))
    assert found.excess.shape == (100,) and found.barrier == pytest.approx(found.excess.mean())
    assert found.stderr[0] == pytest.approx(found.excess.std() / 10, rel=0.1)
    (low,), (high,) = found.interval()
    assert low < 1 + x.mean().item() < high
    assert high - low == pytest.approx(2 * 1.96 * found.stderr[0], rel=0.1)
    assert found.cost.forward_passes == 21 and found.over == "images"


def test_the_interval_covers_on_a_small_scale():
    hits = 0
    for seed in range(60):
        x = noise(80, seed)
        (low,), (high,) = connect(wells(-1.0, x), wells(1.0, x), grid=3, seed=seed).interval(0.8)
        hits += low < 1.0 < high
    assert 38 <= hits <= 57  # 48 expected of 60, standard deviation 3.1


def test_without_a_barrier_the_height_is_negative():
    x = noise(40)
    found = connect(wells(0.9, x), wells(1.3, x), grid=5)
    t = found.position
    ends = [((w**2 - 1) ** 2) for w in (0.9, 1.3, 0.9 + 0.4 * t)]
    height = ends[2] - (1 - t) * ends[0] - t * ends[1]
    assert found.barrier == pytest.approx(height * (1 + found_x(found, x)), rel=1e-9) and found.barrier < 0


def found_x(found, x):
    """The mean of x over the half that was evaluated, from what each image said."""
    t = found.position
    w = [0.9, 1.3, 0.9 + 0.4 * t]
    height = (w[2] ** 2 - 1) ** 2 - (1 - t) * (w[0] ** 2 - 1) ** 2 - t * (w[1] ** 2 - 1) ** 2
    each = found.excess / height - 1
    assert all(np.abs(x.numpy() - value).min() < 1e-9 for value in each) and len(set(each.round(9))) == len(each)
    return each.mean()


def test_strata_weigh_equally():
    x = torch.cat([torch.zeros(6, dtype=torch.float64), torch.ones(60, dtype=torch.float64)])
    strata = {"few": slice(0, 6), "many": slice(6, 66)}
    found = connect(wells(-1.0, x, strata), wells(1.0, x, strata), grid=5)
    assert found.barrier == pytest.approx(1.5) and found.losses[2] == pytest.approx([1.0, 2.0])


def pair(name="conv_bn"):
    """Two networks of one architecture with other weights and other statistics."""
    case = cases.make(name).double()
    other = copy.deepcopy(case.model)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.3 * torch.rand(tensor.shape, generator=rng, dtype=torch.float64)
    return case, case.landscape([10, 14]), cases.Case(other, case.inputs, case.targets).landscape([10, 14])


def test_both_ends_are_the_checkpoints_and_the_middle_lies_between(untouched):
    case, first, second = pair()
    with untouched(first.model), untouched(second.model):
        found = connect(first, second, grid=5)
    middle = copy.deepcopy(first.model)
    with torch.no_grad():
        mixed = {k: (v + second.model.state_dict()[k]) / 2 for k, v in first.model.state_dict().items()}
        middle.load_state_dict({k: v if v.is_floating_point() else v.long() for k, v in mixed.items()})
    here = cases.Case(middle, case.inputs, case.targets).landscape()
    expected = [each.base_loss[0] for each in (first, here, second)]
    assert found.losses[[0, 2, 4], 0] == pytest.approx(expected, rel=1e-9)
    assert found.statistics == "interpolated"


@pytest.mark.parametrize("sizes", [[24], [5, 1, 11, 7]])
def test_statistics_can_be_recomputed_along_the_line(sizes, untouched):
    case, first, second = pair()
    batches = list(zip(case.inputs.split(sizes), case.targets.split(sizes), strict=True))
    with untouched(first.model):
        found = connect(first, second, grid=3, recompute=batches)
    fresh = copy.deepcopy(second.model)  # the end: its weights, statistics from the batches, weighed by size
    seen = 0
    fresh.train()
    for x, _ in batches:
        seen += len(x)
        for layer in fresh:
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = len(x) / seen
        with torch.no_grad():
            fresh(x)
    end = cases.Case(fresh.eval(), case.inputs, case.targets).landscape()
    assert found.losses[-1, 0] == pytest.approx(end.base_loss[0], rel=1e-9)
    assert abs(found.losses[-1, 0] - second.base_loss[0]) > 1e-3 and found.statistics == "recomputed"


def test_a_plane_with_recomputed_statistics_agrees_with_the_line(untouched):
    case, first, second = pair()
    batches = list(zip(case.inputs.split([9, 15]), case.targets.split([9, 15]), strict=True))
    along = connect(first, second, grid=5, recompute=batches)
    u = second.point - first.point
    v = torch.flip(u, [0])
    with untouched(first.model):
        found = plane(first, given_directions(first, [u, v]), grid=(along.places, [0.0, 0.5]), recompute=batches)
    assert found.of()[:, 0] == pytest.approx(along.losses[:, 0], rel=1e-9) and found.statistics == "recomputed"
    assert plane(first, given_directions(first, [u, v]), grid=([0.0, 1.0], [0.0, 0.5])).statistics == "own"


def test_the_band_is_that_of_the_mean_over_images():
    x = noise(50)
    found = connect(wells(-1.0, x), wells(1.0, x), grid=5)
    assert found.errors[2] == pytest.approx(float(x.std()) / 50**0.5) and found.errors[[0, 4]] == pytest.approx(0)
    frame = found.to_frame()
    assert frame["height"][2] == pytest.approx(1 + float(x.mean())) and found.length == 2.0
    assert frame["high"][2] - frame["low"][2] == pytest.approx(2 * 1.96 * found.errors[2], rel=0.1)
    assert frame["distance"].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_the_seed_chooses_the_halves():
    x = noise(60)
    ends = wells(-1.0, x), wells(1.0, x)
    first, again, other = (connect(*ends, grid=3, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.bootstrap, again.bootstrap) and np.array_equal(first.excess, again.excess)
    assert set(first.excess) != set(other.excess)


def test_a_line_that_leaves_the_numbers_says_so():
    x = noise(20)
    first, second = wells(-1.0, x), wells(1.0, x)
    second.model.w.data.fill_(1e100)
    second = Landscape(second.model, [(x, x)], lambda outputs, targets: outputs, check=False)
    found = connect(first, second, grid=3)
    assert not np.isfinite(found.barrier) and found.nonfinite_share > 0


def test_the_drawing_names_the_barrier():
    x = noise(30)
    ax = connect(wells(-1.0, x), wells(1.0, x), grid=9).plot()
    assert "barrier" in ax.get_legend().get_texts()[0].get_text() and ax.get_ylabel() == "loss (nats)"


def test_mistakes_are_one_sentence():
    _, first, second = pair()
    x = noise(20)
    refuses(lambda: connect(first, cases.make("mlp").landscape()), "one architecture")
    refuses(lambda: connect(wells(-1.0, x), wells(1.0, noise(20, 1))), "same data")
    refuses(lambda: connect(first, second, grid=2), "grid must be an integer >= 3, got 2")
    refuses(lambda: connect(wells(-1.0, x[:3]), wells(1.0, x[:3])), "at least 4 images")
    refuses(lambda: connect(first, second, recompute=[]), "recompute", "no sample")
    bare, images = cases.make("mlp").landscape(), [(x, x)]
    refuses(lambda: connect(bare, bare, recompute=images), "recompute", "BatchNorm")
    refuses(lambda: plane(bare, grid=3, recompute=images), "recompute", "BatchNorm")
    refuses(lambda: connect(first, second, grid=3).interval(1.5), "0.95")


def halves(seed, loss=torch.nn.functional.cross_entropy):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return model, lambda **kwargs: Landscape(model, [(x, (x[:, 0] > 0).long())], loss, **kwargs)


def test_parts_that_do_not_vary_must_be_equal():
    (one, first), (two, second) = halves(0), halves(1)
    refuses(lambda: connect(first(params="2.*"), second(params="2.*")), "do not vary differ", "0.weight, 0.bias")
    two[0].load_state_dict(one[0].state_dict())
    ends = first(params="2.*"), second(params="2.*")
    found = connect(*ends, grid=3)
    assert found.losses[-1] == pytest.approx(ends[1].base_loss, rel=1e-6)


def test_both_ends_must_have_one_loss():
    first, second = halves(0)[1](), halves(1, lambda o, t: 100 * torch.nn.functional.cross_entropy(o, t))[1]()
    refuses(lambda: connect(first, second), "one loss function")
