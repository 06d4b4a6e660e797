"""Holm's adjustment: against an example by hand, its own definition, and its promise."""

import numpy as np
import pytest
from stores import refuses

from flatlab.results.estimate import Estimate
from flatlab.results.verdicts import holm


def test_an_example_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([0.2]).tolist() == [0.2] and holm([]).tolist() == []


def step_down(p_values, level):
    """Which of the tests the procedure rejects, step by step as Holm wrote it."""
    rejected = set()
    for step, index in enumerate(np.argsort(p_values)):
        if not p_values[index] <= level / (len(p_values) - step):
            break
        rejected.add(int(index))
    return rejected


def test_the_adjusted_ones_reject_what_the_steps_reject():
    rng = np.random.default_rng(0)
    for _ in range(300):
        p_values, level = rng.beta(0.3, 1, size=rng.integers(1, 9)), rng.uniform(0.01, 0.2)
        assert set(np.flatnonzero(holm(p_values) <= level).tolist()) == step_down(p_values, level)


def test_the_family_keeps_its_level():
    """4,000 families of 8 dependent tests without an effect: 5 % at most have a rejection."""
    rng = np.random.default_rng(1)
    common, own = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 8))
    t = np.sqrt(0.5) * common + np.sqrt(0.5) * own
    p_values = np.array([[Estimate(x, 1.0, 10**9).p_value for x in row] for row in t])
    share = np.mean([(holm(row) <= 0.05).any() for row in p_values])
    assert 0.02 < share <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 4000)


def test_a_test_that_could_not_be_made_counts_in_the_family():
    adjusted = holm([0.01, np.nan, 0.02])
    assert np.isnan(adjusted[1]) and adjusted[[0, 2]] == pytest.approx([0.03, 0.04])


def test_a_p_value_and_an_interval_say_the_same():
    for value in (-2.0, 0.3, 2.2, 2.3):
        found = Estimate(value, 1.0, 9)
        assert (found.p_value < 0.05) == (abs(value) > found.half_width(0.95))
    assert Estimate(2.262157, 1.0, 9).p_value == pytest.approx(0.05, abs=1e-6)  # a table of Student's t
    assert Estimate(0.0, 0.0, 9).p_value == 1.0 and Estimate(1.0, 0.0, 9).p_value == 0.0
    assert np.isnan(Estimate(1.0, np.nan, 1).p_value)


def test_mistakes_are_sentences():
    refuses(lambda: holm([0.5, 1.5]), "numbers from 0 to 1", "1.5")
    refuses(lambda: holm([[0.5]]), "one row")
