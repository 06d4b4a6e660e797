"""Two-way sampling by repetition: unbiased means, honest errors, and intervals that cover as often as they say."""

import numpy as np
import pytest

from flatlab.results.estimate import Components, components, estimate, mean_of

IMAGES, SIZE = 128, 4  # 32 blocks of four images
BLOCKS = IMAGES // SIZE
TRUTH = 1.7


def sampled(rng, count, *, blocks=BLOCKS, directions=1.0, images=2.0, rest=3.0, cut=None):
    """Visits (J,) to a fixed population of images: each visit draws a direction and noise for each image of a block."""
    main = images * np.linspace(-1, 1, IMAGES) ** 3
    main = TRUTH + rng.permutation(main - main.mean()).reshape(blocks, -1) if cut is None else cut
    index = np.arange(count) % blocks
    noise = rng.normal(size=(count, IMAGES // blocks)).mean(axis=1)
    return main[index].mean(axis=1) + directions * rng.normal(size=count) + rest * noise


def repeated(count, repeats=3000, between=0.0, **kinds):
    rng = np.random.default_rng(count)
    found = [estimate(sampled(rng, count, **kinds), kinds.get("blocks", BLOCKS), between) for _ in range(repeats)]
    value, stderr, half = np.array([(e.value, e.stderr, e.half_width()) for e in found]).T
    return value, stderr, np.mean(np.abs(value - TRUTH) <= half)


@pytest.mark.parametrize("count", [64, 96, 70, 80, 120])
def test_two_rounds_and_more_cover_as_often_as_they_say(count):
    """Complete rounds, and partial ones beyond the second."""
    value, stderr, cover = repeated(count)
    assert abs(value.mean() - TRUTH) < 3.5 * value.std() / np.sqrt(len(value))
    assert np.mean(stderr**2) == pytest.approx(value.var(), rel=0.12)
    assert 0.935 <= cover <= 0.965


@pytest.mark.parametrize("count", [50, 63])
def test_the_spread_of_a_second_round_is_used_from_16_blocks_on(count):
    value, stderr, cover = repeated(count)
    assert abs(value.mean() - TRUTH) < 3.5 * value.std() / np.sqrt(len(value))
    assert np.mean(stderr**2) == pytest.approx(value.var(), rel=0.12)
    assert 0.935 <= cover <= 0.965


@pytest.mark.parametrize("count", [8, 20])
def test_less_than_a_round_samples_images_too(count):
    value, stderr, cover = repeated(count)
    assert abs(value.mean() - TRUTH) < 3.5 * value.std() / np.sqrt(len(value))
    assert 0.94 < np.mean(stderr**2) / value.var() < 1.35  # without replacement: a little too wide
    assert 0.935 <= cover <= 0.985


@pytest.mark.parametrize("count", [8, 20, 28, 32])
def test_a_known_share_of_images_makes_a_part_of_a_round_exact(count):
    """Drawn without replacement, images that were seen leave less to be sampled, and at the end of a round nothing."""
    share = Components(1.0, 36 * (np.linspace(-1, 1, IMAGES) ** 3).var(ddof=1), 9.0).between(SIZE)
    value, stderr, cover = repeated(count, between=share, images=6.0)
    assert abs(value.mean() - TRUTH) < 3.5 * value.std() / np.sqrt(len(value))
    assert np.mean(stderr**2) == pytest.approx(value.var(), rel=0.12)
    assert 0.93 <= cover <= 0.965
    assert np.mean(stderr**2) < 0.95 * np.mean(repeated(count, images=6.0)[1] ** 2)  # what it would be else


@pytest.mark.parametrize("count", [32, 40])
def test_one_round_errs_on_the_wide_side(count):
    value, stderr, cover = repeated(count)
    assert abs(value.mean() - TRUTH) < 3.5 * value.std() / np.sqrt(len(value))
    assert np.mean(stderr**2) >= value.var()
    assert cover >= 0.945


def test_heavy_tails_are_covered_too():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(3000):
        visits = TRUTH + sampled(rng, 128, directions=0.0, cut=np.zeros((BLOCKS, SIZE)))
        visits += rng.chisquare(2, size=128) - 2
        found = estimate(visits, BLOCKS)
        hits += abs(found.value - TRUTH) <= found.half_width()
    assert 0.935 <= hits / 3000 <= 0.965


def test_one_block_is_the_crossed_design():
    visits = np.random.default_rng(0).normal(size=9)
    assert estimate(visits, 1) == mean_of(visits)


def test_the_images_main_effect_cancels_in_complete_rounds():
    rng = np.random.default_rng(1)
    main = rng.normal(size=BLOCKS) * 100
    found = estimate(np.tile(main, 3) + 2.0, BLOCKS)
    assert found.value == pytest.approx(main.mean() + 2.0, rel=1e-12) and found.stderr < 1e-10
    assert found.freedom == 2 * BLOCKS
    assert mean_of(np.tile(main, 3)).stderr > 5  # what the naive error would say


def test_the_error_is_that_of_a_one_way_layout():
    visits = np.random.default_rng(2).normal(size=(3, 20))
    found = estimate(visits.ravel(), 20)
    within = visits.var(axis=0, ddof=1).mean()
    assert found.stderr == pytest.approx(np.sqrt(within / 60)) and found.freedom == 40


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("count", "blocks"), [(12, 4), (3, 4), (12, 1), (6, 4)])
def test_what_is_not_finite_is_shown(bad, count, blocks):
    visits = np.ones(count)
    visits[1] = bad
    found = estimate(visits, blocks)
    assert not np.isfinite(found.value) and not np.isfinite(found.stderr)
    assert not np.isfinite(found.half_width())


def test_no_visits_say_nothing_and_one_has_no_error():
    for blocks in (1, 4):
        assert np.isnan(estimate(np.zeros(0), blocks).value) and np.isnan(estimate(np.zeros(0), blocks).stderr)
        one = estimate(np.array([3.0]), blocks)
        assert one.value == 3.0 and np.isnan(one.stderr)


def test_components_are_unbiased():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(400):
        shape = (16, 4, 16)
        table = 5.0 + 2.0 * rng.normal(size=(16, 4, 1)) + 1.5 * rng.normal(size=(16, 1, 16)) + rng.normal(size=shape)
        each = components(table)
        found.append((each.directions, each.images, each.rest))
    spread = np.std(found, axis=0) / 20
    assert np.all(np.abs(np.mean(found, axis=0) - [4.0, 2.25, 1.0]) < 3.5 * spread)


def test_components_say_the_variance_of_a_visit():
    assert Components(2.0, 5.0, 8.0).of_draw(16) == 2.5
    broken = components(np.full((2, 3, 4), np.inf))
    assert np.isnan([broken.directions, broken.images, broken.rest]).all()
    assert components(np.ones((2, 3, 4))) == Components(0.0, 0.0, 0.0)


def test_strata_are_not_mistaken_for_images():
    """A block holds its share of each stratum: what differs between strata is the same in all blocks."""
    rng, found = np.random.default_rng(4), []
    strata = np.tile(np.repeat([0, 1, 2], [8, 7, 1]), (16, 1))
    for _ in range(400):
        table = 2.0 * rng.normal(size=(16, 4, 1)) + 1.5 * rng.normal(size=(16, 1, 16)) + rng.normal(size=(16, 4, 16))
        found.append(components(table + 10.0 * strata[:, None], strata).images)
    # The one image of the third stratum says nothing of the variance there, which is then taken as zero.
    assert abs(np.mean(found) - 2.25 * 15 / 16) < 3.5 * np.std(found) / 20


def test_the_share_between_images():
    assert Components(1.0, 8.0, 4.0).between(4) == pytest.approx(0.5)
    assert Components(0.0, 0.0, 0.0).between(4) == 0.0 and Components(np.nan, 1.0, 1.0).between(4) == 0.0
