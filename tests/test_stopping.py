"""Sampling stops where it should, says why, and the interval holds after it has stopped."""

import numpy as np
import pytest
from cases import in_blocks, softmax

from flatlab.errors import UserError
from flatlab.metrics.flatness import planning
from flatlab.metrics.flatness.sampler import Goal, Sampler
from flatlab.metrics.flatness.sphere import sphere_flatness
from flatlab.results.sphere import SamplingPlan


class Synthetic(Sampler):
    """Visits that are drawn, not measured: skewed like a rise, at a cost that counts."""

    def evaluate(self, plans, visits):
        rises = np.array([[self.draw(j, plan) for plan in plans] for j in visits])
        return rises[None, :, :, None]

    def draw(self, visit, plan):
        if not hasattr(self, "drawn"):
            self.drawn = np.random.default_rng(self.seed).chisquare(2, size=20_000) / 2
        return plan.radius * self.drawn[visit]


def synthetic(goal, *, radii=(1.0,), visits=0, seed=0, size=8, report=None):
    sampler = Synthetic([SOFTMAX], seed, "none")
    return sampler.run([SamplingPlan(radius, size, visits=visits) for radius in radii], goal, report=report), sampler


SOFTMAX = softmax()


def test_it_stops_at_the_larger_of_two_errors():
    (draws,), _ = synthetic(Goal(0.05, 0.0))
    assert draws.stopped == "accuracy" and 380 < draws.visits.shape[1] < 600  # (1 / 0.05)^2 = 400 visits
    (draws,), _ = synthetic(Goal(0.0, 0.1))
    assert draws.stopped == "accuracy" and 95 < draws.visits.shape[1] < 200
    (draws,), _ = synthetic(Goal(0.01, 0.2))
    assert draws.stopped == "accuracy" and draws.visits.shape[1] == 180  # a round of 12, and 160 at least
    (draws,), _ = synthetic(Goal(0.01, 0.2), size=16)
    assert draws.stopped == "accuracy" and draws.visits.shape[1] == 90  # a round of 6, and 80 at least
    (draws,), _ = synthetic(Goal(0.01, 0.9), size=2)
    assert draws.visits.shape[1] == 48 + 640 and draws.blocks == 48  # as many images as 80 blocks of 16 have


def test_it_stops_short_of_a_round_where_the_spread_is_known():
    sampler = Synthetic([softmax(4096, cut=4096)], 0, "none")
    (draws,) = sampler.run([SamplingPlan(1.0, 16)], Goal(0.01, 0.9))
    assert draws.visits.shape[1] == 88 and draws.blocks == 256  # 81 at least, in units of 8


def test_looks_come_when_the_spread_is_known_and_at_most_double():
    counts = []
    synthetic(Goal(0.02, 0.0), size=16, report=lambda per_radius: counts.append(per_radius[0].visits.shape[1]))
    looks = []
    judge = Sampler._verdict
    try:
        Sampler._verdict = lambda self, draws, group, goal: looks.append(group.done) or judge(self, draws, group, goal)
        (draws,), _ = synthetic(Goal(0.02, 0.0), visits=150, size=16)
    finally:
        Sampler._verdict = judge
    assert looks[:2] == [90, 150]  # 80 visits and a round at least; then what was foreseen, in whole rounds
    assert all(a < b <= 2 * a for a, b in zip(looks, looks[1:], strict=False)) and looks[-1] == draws.visits.shape[1]
    assert counts[0] == 8 and counts == sorted(counts)


def test_a_budget_is_kept_shared_and_said():
    for budget in (200, 1000, 3000):
        per_radius, sampler = synthetic(Goal(0.001, 0.0, budget), radii=(1.0, 2.0))
        assert {draws.stopped for draws in per_radius} == {"budget"}
        assert budget - 8 * 3 < sampler.spent <= budget
    sampler = Synthetic([SOFTMAX], 0, "none")
    per_radius = sampler.run(
        [SamplingPlan(1.0, 8), SamplingPlan(2.0, 16), SamplingPlan(3.0, 0)], Goal(0.001, 0.0, 9000)
    )
    assert {draws.stopped for draws in per_radius} == {"budget"} and all(
        draws.visits.shape[1] > 2 for draws in per_radius
    )
    found = in_blocks(softmax(), [1.0, 2.0], 8, budget=1000)
    assert found.stopped == ("budget", "budget") and not found.converged and found.cost.images <= 1000
    assert np.isfinite(found.interval()).all()
    assert planning.goal_of(softmax(), 2, None, (0.1, 0.1), None).budget == 100 * 96 * 2


@pytest.mark.parametrize(("budget", "visits"), [(5, 0), (30, 1), (50, 2)])
def test_a_budget_of_less_than_two_visits_says_nothing(budget, visits):
    found = in_blocks(softmax(), [1.0], 8, budget=budget)  # a visit: there, back, and at rest
    assert len(found.visits[0]) == visits and found.stopped == ("budget",)
    assert np.isfinite(found.stderr[0]) == (visits > 1) and found.nonfinite_share == 0.0
    with pytest.raises(UserError, match=r"A pilot at 1 radii forwards [\d,]+ images, more than the budget of 30"):
        sphere_flatness(softmax(), [1.0], budget=30)


def test_stopping_leaves_the_interval_whole():
    """Skewed visits, looked at and stopped 1,500 times: the interval covers, and the value is hardly biased."""
    values, hits = [], 0
    for seed in range(1500):
        (draws,), sampler = synthetic(Goal(0.06, 0.0), visits=300, seed=seed)
        found = sampler.estimate(draws)
        values.append(found.value)
        hits += abs(found.value - 1) <= found.half_width()
    assert 0.93 <= hits / 1500 <= 0.965
    assert abs(np.mean(values) - 1) < 0.005  # a twelfth of the error that was asked for
