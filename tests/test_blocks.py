"""Blocks: each sample once, each stratum's share in each, and a mean over them that is the landscape's own."""

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from flatlab import seeds
from flatlab.errors import UserError
from flatlab.landscape import blocks
from flatlab.landscape.blocks import Partition, Samples
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.tensors.losses import sample_losses
from flatlab.tensors.nested import Batch, concatenate


def numbered(*strata):
    """Batches of these sizes, whose samples are numbers from 0 on within each stratum."""
    return [
        [Batch(part, part, len(part)) for part in torch.arange(float(sum(cut))).split(cut) if len(part)]
        for cut in map(list, strata)
    ]


def partition(strata, block_size, *, generator):
    return Partition([sum(batch.size for batch in stratum) for stratum in strata], block_size, generator=generator)


def picked(block, strata):
    """The numbers of a block's samples, for each stratum."""
    batch = Samples(strata).pick(block.rows)
    found = {part.row: batch.inputs[part.start : part.stop].tolist() for part in block.parts}
    return [found.get(row, []) for row in range(len(strata))]


CUTS = some.lists(some.lists(some.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(cuts=CUTS, block_size=some.integers(1, 40), seed=some.integers(0, 5))
def test_a_partition_holds_each_sample_and_each_block_some_of_each_stratum(cuts, block_size, seed):
    strata, sizes = numbered(*cuts), np.array([sum(cut) for cut in cuts])
    parts = partition(strata, block_size, generator=seeds.generator("blocks", seed))
    held = [picked(block, strata) for block in parts]
    assert len(parts) == len(held) == max(1, round(sizes.sum() / block_size))
    assert parts.sizes.tolist() == [block.size for block in parts]
    for row, size in enumerate(sizes):
        uses = np.bincount(np.concatenate([each[row] for each in held]).astype(int), minlength=size)
        assert (uses == 1).all() if size >= len(parts) else np.ptp(uses) <= 1 and uses.min() >= 1
        assert np.ptp([len(each[row]) for each in held]) <= 1 and min(len(each[row]) for each in held) >= 1
    if (sizes >= len(parts)).all():
        assert np.ptp([block.size for block in parts]) <= 1
    # Over the partition, the mean of the shares is the mean over the samples, whatever these lose.
    for row, size in enumerate(sizes):
        shares = [
            block.shares(np.array([[sum(each[p.row]) if p.row == row else 0.0 for p in block.parts]]))[0]
            for block, each in zip(parts, held, strict=True)
        ]
        assert np.mean(shares, axis=0)[row] == pytest.approx(np.arange(size).mean())


def test_the_shuffle_is_seeded_and_reaches_everywhere():
    strata = numbered([20])
    first = [[picked(b, strata) for b in partition(strata, 5, generator=seeds.generator(s))] for s in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    homes = np.zeros((20, 4))
    for seed in range(400):
        for index, block in enumerate(partition(strata, 5, generator=seeds.generator(seed))):
            homes[np.array(picked(block, strata)[0], dtype=int), index] += 1
    assert np.abs(homes - 100).max() < 4.5 * np.sqrt(400 * 0.25 * 0.75)


def test_partitions_are_those_of_earlier_versions():
    """Rows of numbered samples by a plain rule: seat s gets each count-th of the shuffled samples, from s on."""
    sizes, rng = [23, 17], seeds.generator("plain")
    orders, dealt = [torch.randperm(size, generator=rng).tolist() for size in sizes], [0, 23]
    seats = torch.randperm(8, generator=rng).tolist()
    plain = [[sorted(o[(seat - d) % 8 :: 8]) for o, d in zip(orders, dealt, strict=True)] for seat in seats]
    strata = numbered([10, 13], [17])
    assert [picked(b, strata) for b in partition(strata, 5, generator=seeds.generator("plain"))] == plain


@pytest.mark.parametrize("store", [0, 2**28])
def test_samples_are_the_same_from_one_store_and_from_the_batches(store, monkeypatch):
    monkeypatch.setattr(blocks, "JOINED", store)
    strata = numbered([4, 1, 6], [3, 2])
    samples = Samples(strata)
    assert len(samples._batches) == (1 if store else 5)
    for block in partition(strata, 4, generator=seeds.generator("store")):
        batch = samples.pick(block.rows)
        assert batch.size == block.size == len(batch.inputs)
        assert batch.inputs.tolist() == [float(row if row < 11 else row - 11) for row in block.rows]


def strata_of(case, cuts):
    """A landscape over a case's samples, cut into strata and these into batches."""
    inputs = case.inputs.split([sum(cut) for cut in cuts])
    targets = case.targets.split([sum(cut) for cut in cuts])
    data = {
        str(index): list(zip(x.split(cut), y.split(cut), strict=True))
        for index, (x, y, cut) in enumerate(zip(inputs, targets, cuts, strict=True))
    }
    return Landscape(case.model, data, case.loss, check=False)


@settings(deadline=None, max_examples=25)
@given(first=some.integers(1, 22), second=some.integers(0, 22), block_size=some.integers(1, 30))
def test_the_mean_over_all_blocks_is_the_landscape(first, second, block_size):
    case = cases.make("mlp").double()
    second = min(second, 23 - first)
    cuts = [[first], [1, second] if second else [1], [23 - first - second]]
    landscape = strata_of(case, [cut for cut in cuts if sum(cut)])
    ray = landscape.point.sign()
    with landscape.moving() as at:
        gathered = [landscape.gather(block) for block in landscape.blocks(block_size)]
        shares = np.array([at(ray, [0.0, 0.3], block=block) for block in gathered])
    for index, radius in enumerate((0.0, 0.3)):
        whole = landscape.evaluate(landscape.point + radius * ray).losses
        assert shares[:, index].mean(axis=0) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_case_is_cut_into_blocks_and_samples(name, untouched):
    case = cases.make(name)
    landscape = case.landscape(cases.CUTS["uneven"])
    ray = landscape.point
    with untouched(case.model), landscape.moving() as at:
        means = []
        for block in landscape.blocks(5):
            whole = at(ray, 0.1, block=landscape.gather(block))
            each = at(ray, 0.1, block=landscape.gather(block.by_sample()))
            assert each.shape == (block.size,) and each.mean() == pytest.approx(whole.mean(), rel=1e-5)
            means.append(whole)
        assert np.mean(means) == pytest.approx(at(ray, 0.1)[0], rel=1e-5)
        assert np.array_equal(at(ray, [[0.1], [0.2]])[0, 0], at(ray, 0.1)) and at(ray, [[0.1], [0.2]]).shape == (
            2,
            1,
            1,
        )


def test_single_samples_of_strata_weigh_as_in_the_block():
    landscape = strata_of(cases.make("mlp").double(), [[3], [9, 2], [10]])
    ray = landscape.point
    with landscape.moving() as at:
        for block in landscape.blocks(4):
            whole, each = (at(ray, 0.2, block=landscape.gather(b)) for b in (block, block.by_sample()))
            assert each.mean() == pytest.approx(whole.mean(), rel=1e-12)


def test_images_keep_their_memory_format():
    images = torch.randn(10, 3, 4, 4, generator=seeds.generator("format")).to(memory_format=torch.channels_last)
    batches = [[Batch(part, part[:, 0, 0, 0], len(part)) for part in images.split([4, 6])]]
    for block in partition(batches, 5, generator=seeds.generator(0)):
        assert Samples(batches).pick(block.rows).inputs.is_contiguous(memory_format=torch.channels_last)


class Pair(nn.Module):
    """Takes a nest: a dict of two tensors, and one that is absent."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, inputs):
        assert inputs["none"] is None
        return {"out": inputs["a"] * self.w[0] + inputs["b"].sum(1) * self.w[1]}


def test_nests_go_through_blocks():
    rng = seeds.generator("nests")
    nest = {"a": torch.randn(9, generator=rng), "b": torch.randn(9, 3, generator=rng), "none": None}
    targets = (torch.randn(9, generator=rng),)
    batches = [
        ({k: v if v is None else v[i:j] for k, v in nest.items()}, (targets[0][i:j],)) for i, j in ((0, 5), (5, 9))
    ]
    landscape = Landscape(Pair().eval(), batches, lambda o, t: (o["out"] - t[0]) ** 2)
    with landscape.moving() as at:
        shares = [at(landscape.point, 0.5, block=landscape.gather(block)) for block in landscape.blocks(2)]
    assert np.mean(shares) == pytest.approx(landscape.evaluate(1.5 * landscape.point).loss, rel=1e-6)


def test_samples_of_different_shapes_are_refused_in_blocks_and_measured_whole():
    from flatlab.metrics.flatness.sphere import sphere_flatness

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.w * x.mean(1)

    batches = [(torch.ones(40, 3), torch.zeros(40)), (torch.ones(40, 5), torch.zeros(40))]
    landscape = Landscape(Mean().eval(), batches, lambda o, t: (o - t) ** 2)
    with pytest.raises(UserError, match="different shapes cannot share a block; give num_samples"):
        sphere_flatness(landscape, [1.0])
    assert sphere_flatness(landscape, [1.0], num_samples=3).value[0] > -1.0
    with pytest.raises((RuntimeError, ValueError)):
        concatenate([batch[:1] for batch in batches])


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)],
    ids=["function", "module", "smooth"],
)
def test_losses_of_single_samples_are_the_same_bytes_in_one_call(loss):
    case = cases.make("conv_bn")
    known = Landscape(case.model, case.batches([5, 1, 11, 7]), loss)
    hidden = Landscape(case.model, case.batches([5, 1, 11, 7]), lambda outputs, targets: loss(outputs, targets))
    direction = draw_direction(known, 0, 0)
    rows = []
    for around in (known, hidden):
        (block,) = around.blocks(24, seed=0)
        with around.moving() as at:
            rows.append(at(direction, [0.0, 0.3], block=around.gather(block.by_sample())))
    assert rows[0].shape == (2, 24) and np.array_equal(*rows)


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["plain", "smooth"])
def test_the_loss_of_each_sample_in_one_call_gives_that_of_each_stratum(loss):
    case = cases.make("conv_bn")
    batches = case.batches([5, 1, 11, 3, 4])
    data = {"a": batches[:3], "b": batches[3:]}
    known, hidden = (
        Landscape(case.model, data, each) for each in (loss, lambda outputs, targets: loss(outputs, targets))
    )
    direction = draw_direction(known, 0, 0)
    for size in (2, 5, 24):
        for one, other in zip(known.blocks(size), hidden.blocks(size), strict=True):
            with known.moving() as at:
                found = at(direction, [[0.0, 0.3], [-0.3, 1.0]], block=known.gather(one))
            with hidden.moving() as at:
                expected = at(direction, [[0.0, 0.3], [-0.3, 1.0]], block=hidden.gather(other))
            assert found.shape == (2, 2, 2)
            np.testing.assert_allclose(found, expected, rtol=3e-7)


def test_an_unchecked_mean_over_some_samples_alone_stays_that_mean():
    model, (inputs, targets) = nn.Linear(5, 3).eval(), (torch.randn(64, 5), torch.randint(3, (64,)))
    targets[::4] = -100
    losses = []
    for loss in (F.cross_entropy, lambda outputs, targets: F.cross_entropy(outputs, targets)):
        around = Landscape(model, [(inputs, targets)], loss, check=False)
        with around.moving() as at:
            losses.append([at(around.point, block=around.gather(block)) for block in around.blocks(16)])
    assert np.array_equal(*losses)


@pytest.mark.parametrize(
    "loss",
    [
        F.mse_loss,
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(ignore_index=0),
    ],
)
def test_other_losses_are_called_for_each_sample(loss):
    assert sample_losses(loss, torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)) is None
    assert sample_losses(F.cross_entropy, torch.zeros(4, 3, 2), torch.zeros(4, 2, dtype=torch.int64)) is None
