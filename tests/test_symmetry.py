"""Symmetry statistics against definitions by hand and closed forms, and their null against plain simulation."""

import numpy as np
import pytest
from scipy import stats

from flatlab.errors import UserError
from flatlab.results.quantization_noise import POINTS, symmetry, symmetry_null


def test_distances_are_those_of_the_symmetry_plot():
    found = symmetry(np.array([0.0, 1.0, 2.0, 4.0, 9.0]))
    assert found.median == 2.0
    assert found.lower.tolist() == [2.0, 1.0, 0.0] and found.upper.tolist() == [7.0, 2.0, 0.0]
    assert found.departure == pytest.approx((7 - 2) / 2 / 3)  # mid-summary 4.5 against 2, range of 1 to 4
    assert found.slope == pytest.approx((2 * 7 + 1 * 2) / 5) and found.bowley == pytest.approx((2 - 1) / 3)
    even = symmetry(np.array([0.0, 1.0, 3.0, 4.0]))
    assert even.median == 2.0 and even.departure == 0 and even.slope == 1 and even.bowley == 0


@pytest.mark.parametrize("count", [9, 10, 3999, 4001, 50_001])
def test_a_mirrored_sample_is_symmetric_and_thinned(count):
    half = np.sort(np.random.default_rng(0).exponential(size=count // 2))
    middle = [] if count % 2 == 0 else [0.0]
    found = symmetry(np.concatenate([-half[::-1], middle, half]) + 5)
    assert found.median == pytest.approx(5) and len(found.lower) <= POINTS
    assert found.scalars() == pytest.approx({"departure": 0, "slope": 1, "bowley": 0}, abs=1e-12)


def test_an_exponential_is_as_skewed_as_its_quartiles_say():
    sample = np.sort(np.random.default_rng(1).exponential(size=100_000))
    exact = (np.log(4) + np.log(4 / 3) - 2 * np.log(2)) / (np.log(4) - np.log(4 / 3))
    assert symmetry(sample).bowley == pytest.approx(exact, abs=0.01)
    assert symmetry(-sample[::-1]).bowley == pytest.approx(-exact, abs=0.01)
    assert symmetry(3 - 7 * sample[::-1]).departure == pytest.approx(symmetry(sample).departure)


@pytest.mark.parametrize("shape", [stats.uniform(-0.5, 1), stats.triang(0.5), stats.truncnorm(-2, 2)])
def test_the_null_is_what_symmetric_samples_give(shape):
    count = 1001
    samples = np.sort(shape.rvs((400, count), random_state=2), axis=1)
    drawn = symmetry_null(symmetry(samples[0]), count, draws=400)
    for name, values in drawn.items():
        direct = [symmetry(sample).scalars()[name] for sample in samples]
        assert np.mean(values) == pytest.approx(np.mean(direct), abs=0.03)
        assert np.std(values) == pytest.approx(np.std(direct), rel=0.3)


def test_the_null_of_a_uniform_has_the_known_spread():
    sample = np.linspace(-1, 1, 20_000)
    drawn = symmetry_null(symmetry(sample), len(sample), draws=2000)
    assert drawn["bowley"].std() == pytest.approx(np.sqrt(2 / len(sample)), rel=0.06)  # of uniform quartiles
    assert drawn["bowley"].mean() == pytest.approx(0, abs=4 * drawn["bowley"].std() / 2000**0.5)
    other = symmetry_null(symmetry(sample), len(sample), draws=2000, seed=1)
    assert not np.isclose(drawn["slope"], other["slope"]).any()


def test_a_sample_without_a_middle_is_refused():
    for sample in (np.zeros(100), np.array([0.0, 1.0, 2.0])):
        with pytest.raises(UserError, match="four numbers"):
            symmetry(sample)
