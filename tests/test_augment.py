"""The training transform against torchvision's on Pillow images: single operations exactly, the whole by distribution.

Seeds are fixed, so nothing here is flaky. Bounds of the Kolmogorov-Smirnov tests are p > 0.001; the controls show that
a wrong constant is seen with p < 1e-4 by the same tests.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms.v2 import functional as v2

from flatlab.data import augment as a
from flatlab.data.batches import TrainingStream
from flatlab.data.domains import Domain, DomainSet
from flatlab.data.images import Ragged
from flatlab.errors import UserError
from flatlab.seeds import generator

SIZES = [(48, 48), (40, 72), (90, 45)]  # the last is too narrow for many a box
SIZE = 24
N = 1000
CPU = torch.device("cpu")
DOMAINBED = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=(0.7, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
        transforms.RandomGrayscale(),
    ]
)


def picture(height, width):
    """A smooth picture with colours, lighter on the right and redder at the top, so that all operations show."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    waves = [0.5 + 0.2 * np.sin(7 * x + k) * np.cos(5 * y + 2 * k) for k in range(3)]
    pixels = np.stack([waves[0] + 0.3 * (1 - y), waves[1] + 0.15 * x, waves[2] - 0.3 * x], axis=-1)
    return (pixels.clip(0, 1) * 255).astype(np.uint8)


def ours(height, width, seed=0, n=N):
    one = torch.from_numpy(picture(height, width)).permute(2, 0, 1).contiguous()
    draws = a.draw(np.tile([[height, width]], (n, 1)), generator("test", seed))
    return a.augment([one] * n, draws, SIZE).numpy()


def theirs(height, width, seed=0, n=N):
    image = Image.fromarray(picture(height, width))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return np.stack([np.asarray(DOMAINBED(image)) for _ in range(n)]).transpose(0, 3, 1, 2).astype(float)


def summaries(images):
    """What a transform changes, a number for each image: (n, 12)."""
    means, spreads = images.mean(axis=(2, 3)), images.std(axis=(2, 3))
    luma = images.mean(axis=1)
    across = luma[:, :, SIZE // 2 :].mean(axis=(1, 2)) - luma[:, :, : SIZE // 2].mean(axis=(1, 2))
    down = luma[:, SIZE // 2 :].mean(axis=(1, 2)) - luma[:, : SIZE // 2].mean(axis=(1, 2))
    detail = np.abs(np.diff(luma, axis=2)).mean(axis=(1, 2)), np.abs(np.diff(luma, axis=1)).mean(axis=(1, 2))
    colour = (images.max(axis=1) - images.min(axis=1)).mean(axis=(1, 2))
    corner = luma[:, 0, 0]
    return np.column_stack([means, spreads, across, down, *detail, colour, corner])


def p_values(first, second):
    columns = zip(summaries(first).T, summaries(second).T, strict=True)
    # Greys have a colourfulness of exactly 0 in Pillow's bytes and of a rounding here.
    return np.array([stats.ks_2samp(x.round(2), y.round(2)).pvalue for x, y in columns])


@pytest.fixture(scope="module")
def pillow():
    return {size: theirs(*size) for size in SIZES}


@pytest.mark.oracle
@pytest.mark.parametrize("size", SIZES)
def test_the_distribution_is_domainbeds(size, pillow):
    mine = ours(*size)
    assert p_values(mine, pillow[size]).min() > 1e-3
    grand = pillow[size].mean(axis=(0, 2, 3), keepdims=True)
    for power in (1, 2):  # the mean of each channel, and its variance
        moments = [((each - grand) ** power).mean(axis=(2, 3)) for each in (mine, pillow[size])]
        error = np.sqrt(sum(each.var(axis=0) for each in moments) / N)
        assert (np.abs(moments[0].mean(axis=0) - moments[1].mean(axis=0)) < 4 * error).all()


@pytest.mark.parametrize(("name", "value"), [("JITTER", 0.22), ("SCALE", (0.5, 1.0)), ("GREY", 0.25)])
def test_a_wrong_constant_would_be_seen(name, value, pillow, monkeypatch):
    monkeypatch.setattr(a, name, value)
    assert min(p_values(ours(*size), pillow[size]).min() for size in SIZES) < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("size", [*SIZES, (100, 20), (20, 100)])
def test_boxes_are_torchvisions(size):
    boxes = a.draw(np.tile([size], (2000, 1)), generator("boxes")).boxes
    blank = torch.empty(3, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [transforms.RandomResizedCrop.get_params(blank, [0.7, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    assert min(stats.ks_2samp(x, y).pvalue for x, y in zip(boxes.T, np.array(drawn).T, strict=True)) > 1e-3
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    if 5 * min(size) == max(size):  # no box fits: the largest central one
        assert (boxes == np.array(drawn)).all()


def test_rates_and_orders():
    draws = a.draw(np.tile([[50, 50]], (6000, 1)), generator("rates"))
    assert stats.binomtest(int(draws.flips.sum()), 6000, 0.5).pvalue > 1e-3
    assert stats.binomtest(int(draws.greys.sum()), 6000, 0.1).pvalue > 1e-3
    counts = np.unique(draws.orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-3
    low, high = draws.factors.min(axis=0), draws.factors.max(axis=0)
    assert np.allclose(low, [0.7, 0.7, 0.7, -0.3], atol=2e-3) and np.allclose(high, [1.3, 1.3, 1.3, 0.3], atol=2e-3)
    assert (
        np.abs(np.corrcoef(np.column_stack([draws.boxes, draws.flips, draws.factors, draws.greys]).T)[4:, :4]).max()
        < 0.05
    )


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "factor"), [("brightness", 1.3), ("contrast", 0.7), ("saturation", 1.2), ("hue", -0.27)]
)
def test_each_operation_is_torchvisions(name, factor):
    images = torch.rand(6, 3, 9, 11, generator=generator("colours"))
    images[0], images[1, :, :4] = images[0, :1], 0.0  # grey and black
    expected = getattr(v2, f"adjust_{name}")(images, factor)
    torch.testing.assert_close(getattr(a, name)(images, torch.full((6, 1, 1, 1), factor)), expected, atol=3e-6, rtol=0)


@pytest.mark.oracle
def test_crops_are_pillows_on_either_path():
    pictures = [torch.from_numpy(picture(*size)).permute(2, 0, 1) for size in SIZES]
    boxes = a.draw(np.array(SIZES), generator("crops")).boxes
    boxes[0] = [3, 5, 9, 7]  # enlarged
    expected = [
        np.asarray(transforms.functional.resized_crop(Image.fromarray(picture(*size)), *box, [SIZE, SIZE]))
        for size, box in zip(SIZES, boxes.tolist(), strict=True)
    ]
    expected = np.stack(expected).transpose(0, 3, 1, 2).astype(float)
    each, together = a._crop_each(pictures, boxes, SIZE).numpy(), a.crop_together(pictures, boxes, SIZE).numpy()
    assert np.abs(each - expected).max() <= 1  # bytes, rounded twice
    assert np.abs(together - expected).max() < 1.01  # not rounded


# --- in the stream -----------------------------------------------------------------------------------------------


def photographs():
    def domain(name, seed):
        sizes = np.array([(30 + 5 * ((k + seed) % 4), 40 + 4 * (k % 3)) for k in range(12)])
        parts = [torch.from_numpy(picture(*size)).permute(2, 0, 1).flatten() for size in sizes]
        squares = torch.zeros(12, 3, SIZE, SIZE, dtype=torch.uint8)
        return Domain(name, squares, torch.arange(12) % 3, Ragged(torch.cat(parts), sizes))

    return DomainSet("photographs", (domain("first", 0), domain("second", 1)), tuple("abc"), (0.5,) * 3, (0.25,) * 3)


def stream(seed=0, augmented=True, names=("first", "second")):
    rows = {name: np.arange(12) for name in names}
    return TrainingStream(photographs(), rows, batch_size=5, seed=seed, device=CPU, augmented=augmented)


def test_batches_are_pure_functions_of_seed_domain_and_step():
    forwards = [stream().batch(step) for step in range(3)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = stream()
    for step in (2, 0, 1):
        assert torch.equal(one.batch(step).inputs, forwards[step].inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stream(seed=1).batch(0).inputs, forwards[0].inputs)
    assert torch.equal(stream(names=("second",)).batch(1).inputs, forwards[1].inputs[5:])
    assert forwards[0].inputs.shape == (10, 3, SIZE, SIZE)
    assert forwards[0].inputs.is_contiguous(memory_format=torch.channels_last)


def test_augmentation_leaves_the_choice_of_images_and_the_images_alone():
    assert torch.equal(stream().batch(3).targets, stream(augmented=False).batch(3).targets)
    assert (stream(augmented=False).batch(3).inputs == -2).all()  # the squares, which are black here
    data = photographs()
    before = data.domains[0].originals.pixels.clone()
    TrainingStream(data, {"first": np.arange(12)}, batch_size=9, seed=0, device=CPU, augmented=True).batch(0)
    assert torch.equal(data.domains[0].originals.pixels, before)


def test_images_without_originals_are_cropped_from_their_squares_and_grey_ones_are_refused():
    images = torch.randint(0, 256, (6, 3, 10, 10), dtype=torch.uint8, generator=generator("squares"))
    data = DomainSet("squares", (Domain("only", images, torch.arange(6)),), tuple("abcdef"), (0.0,) * 3, (1.0,) * 3)
    rows = {"only": np.arange(6)}
    batch = TrainingStream(data, rows, batch_size=4, seed=0, device=CPU, augmented=True).batch(0)
    assert batch.inputs.shape == (4, 3, 10, 10) and batch.inputs.min() >= 0 and batch.inputs.max() <= 1
    grey = DomainSet("grey", (Domain("only", images[:, :1], torch.arange(6)),), tuple("abcdef"), (0.0,), (1.0,))
    with pytest.raises(UserError, match="changes colours, and grey has none"):
        TrainingStream(grey, rows, batch_size=4, seed=0, device=CPU, augmented=True)
