"""Averages against plain arithmetic on recorded weights, and SWAD against scripted series and a simulation."""

import copy
import json
import math
import random

import pytest
import torch

from flatlab.errors import UserError
from flatlab.specs import AverageSpec, RunSpec
from flatlab.train import averages

NEVER = float("nan")


def weights(step):
    """Return the weights of a step: floats to average, an integer to follow."""
    w = torch.randn(3, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return {"w": w, "scale": w[:1, :1].abs(), "count": torch.tensor(step)}


def arithmetic_mean(steps):
    return {name: torch.stack([weights(s)[name] for s in steps]).mean(0) for name in ("w", "scale")}


def assert_mean_of(result, steps, *, follows):
    for name, expected in arithmetic_mean(steps).items():
        torch.testing.assert_close(result[name], expected, rtol=1e-12, atol=1e-12)
    assert result["count"] == follows


def observe(average, steps, losses=None, *, each=None):
    """Show an average the steps in one state_dict that changes in place, as a network's does."""
    live = {name: value.clone() for name, value in weights(0).items()}
    for step in steps:
        for name, value in weights(step).items():
            live[name].copy_(value)
        average.update(live, step, lambda step=step: NEVER if losses is None else losses[step])
        if each:
            average = each(average, step)
    return average


def reloaded(average, spec, *, switch=None):
    """Return a fresh observer that took up the saved state, through JSON and copied tensors."""
    tensors, facts = copy.deepcopy(average.save())
    fresh = averages.build(spec, switch=switch)
    fresh.load((tensors, json.loads(json.dumps(facts))))
    return fresh


# --- last, SWA, SMA ----------------------------------------------------------------------------------------------


def test_last_is_the_network_itself():
    last = averages.build(AverageSpec(), switch=None)
    assert last.result() == {} and last.facts() == {}
    assert torch.equal(observe(last, range(4)).result()["w"], weights(3)["w"])


@pytest.mark.parametrize(
    ("kind", "start", "every", "switch", "steps"),
    [
        ("swa", 3, 1, None, [3, 4, 5, 6, 7, 8, 9, 10]),
        ("swa", 3, 3, None, [3, 6, 9]),
        ("swa", 10, 5, None, [10]),
        ("swa", 0, 4, 5, [5, 9]),  # the switch comes later than the start
        ("sma", 5, 1, None, [3, 4, 5, 6, 7, 8, 9, 10]),  # EoA counts from 1, and keeps the iterate before its start
        ("sma", 1, 1, None, list(range(11))),
        ("sma", 2, 1, 9, [9, 10]),
    ],
)
def test_running_means(kind, start, every, switch, steps):
    average = averages.build(AverageSpec(kind=kind, start=start, every=every), switch=switch)
    observe(average, range(switch or 0, 11))
    assert_mean_of(average.result(), steps, follows=steps[-1])
    assert average.facts() == {"averaged": len(steps)}


def test_sma_before_its_start_is_the_last_iterate():
    average = observe(averages.build(AverageSpec(kind="sma", start=7), switch=None), range(4))
    assert torch.equal(average.result()["w"], weights(3)["w"])
    assert average.facts() == {"averaged": 0}
    assert_mean_of(observe(average, [5, 6]).result(), [5, 6], follows=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_mean_of_equal_weights_is_the_identity(dtype):
    w = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)}
    mean = averages.Mean()
    for _ in range(37):
        mean.add(w)
    assert torch.equal(mean.tensors["w"], w["w"])


@pytest.mark.parametrize("spec", [AverageSpec(kind="swa", start=4, every=3), AverageSpec(kind="sma", start=4)])
def test_running_means_go_on_from_any_state(spec):
    straight = observe(averages.build(spec, switch=None), range(11))
    broken = observe(averages.build(spec, switch=None), range(11), each=lambda a, _: reloaded(a, spec))
    assert all(torch.equal(value, broken.result()[name]) for name, value in straight.result().items())


@pytest.mark.parametrize("kind", ["swa", "sma"])
def test_a_start_beyond_the_end_is_refused(kind):
    fields = {"dataset": "digits", "held_out": "rot0", "image_size": 16, "model": "digits-cnn", "eval_every": 1}
    with pytest.raises(UserError, match=rf"^{kind.upper()} would start at step 9, beyond the end at 5\.$"):
        RunSpec.make(**fields, steps=5, lr=0.1, average=AverageSpec(kind=kind, start=9))


# --- SWAD --------------------------------------------------------------------------------------------------------

SERIES = [1.0, 0.6, 0.5, 0.55, 0.52, 0.5, 0.8, 0.9, 0.95, 1.0]


def swad(losses, *, every=1, **fields):
    """Run SWAD on a series of validation losses, one at each evaluation."""
    average = averages.build(AverageSpec(kind="swad", every=every, **fields), switch=None)
    by_step = {every * index: loss for index, loss in enumerate(losses)}
    return observe(average, range(every * (len(losses) - 1) + 1), by_step)


def valley(average):
    return average.facts()["valley"]


def test_the_scripted_series():
    found = valley(swad(SERIES, converge=3, tolerance=3))
    assert found["threshold"] == pytest.approx(1.3 * (0.5 + 0.55 + 0.52) / 3)
    assert {**found, "threshold": 0} == {"start": 2, "end": 5, "threshold": 0, "dead": True, "merged": [2, 3, 4, 5]}
    assert not valley(swad(SERIES[:8], converge=3, tolerance=3))["dead"]
    assert valley(swad(SERIES[:9], converge=3, tolerance=3))["dead"]


@pytest.mark.parametrize(
    ("losses", "converge", "tolerance", "merged", "dead"),
    [
        ([5, 4, 3, 2, 1], 3, 6, [], False),  # never converged
        ([1, 2], 3, 6, [], False),  # too few evaluations
        ([1.0, 1.1, 1.2, 1.1, 1.0], 3, 6, [0, 1, 2, 3, 4], False),  # alive at the end: all of the window
        ([1.0, 1.1, 1.2, 1.1, 9.0], 3, 6, [0, 1, 2, 3], False),  # but nothing beyond the last below the rim
        ([9, 1.0, 1.1, 1.2, 9, 1.0], 3, 2, [1, 2, 3, 4, 5], False),  # one above the rim is forgiven
        (
            [1.0, 1.1, 1.2, 9, 9, 9, 9, 9, 9],
            3,
            6,
            [0, 1, 2],
            True,
        ),  # tolerance above converge: nothing before the start
        ([9, 8, 7, 1.0, 1.1, 1.2, 9, 9, 9, 9, 9, 9], 3, 6, [3, 4, 5], True),
        ([1.0, 1.1, 2.0, 9, 9, 9, 9], 3, 3, [0, 1], True),  # t_e = i - N_e may lie before the start was seen
        ([1.0, 1.1, 1.2, 9], 3, 1, [0, 1, 2], True),
        ([1.0, NEVER, 1.2, 1.0, 1.1, 1.2], 3, 3, [3, 4, 5], False),  # no valley over a loss that is none
        ([1.0, 1.1, 1.2, NEVER, NEVER, NEVER], 3, 3, [0, 1, 2], True),
    ],
)
def test_the_plain_rule(losses, converge, tolerance, merged, dead):
    average = swad(losses, converge=converge, tolerance=tolerance)
    assert (valley(average)["merged"], valley(average)["dead"]) == (merged, dead)
    steps = merged or [len(losses) - 1]
    assert_mean_of(average.result(), steps, follows=steps[-1])
    assert valley(average)["end"] == (merged[-1] if merged else None)


def plainly(losses, converge, tolerance, ratio):
    """Cha et al. 2021, Algorithm 1, on whole series: t_s, t_e = i - N_e.

    Where the valley lives on, t_e is the last evaluation that is not above the rim, or that no window holds any more.
    """
    count = len(losses)
    for k in range(converge - 1, count):
        first = losses[k - converge + 1 : k + 1]
        if first[0] == min(first):
            start, rim = k - converge + 1, (1 + ratio) * sum(first) / converge
            for i in range(k + 1, count):
                if min(losses[max(0, i - tolerance + 1) : i + 1]) > rim:
                    return list(range(start, i - tolerance + 1))
            low = max(i for i in range(count) if losses[i] <= rim)
            return list(range(start, max(low, k - tolerance + 1) + 1))
    return []


def as_released(losses, converge, tolerance, ratio):
    """khanrc/swad on a list of losses, from a description: the segments in the mean, the overwritten one left out."""
    recent, window, merged, started, dead, rim = [], [], [], None, False, 0.0
    overwritten = None
    for index, loss in enumerate(losses):
        if dead:
            break
        recent, window = [*recent, index][-converge:], [*window, index][-tolerance:]
        if started is None:
            newest = [losses[i] for i in recent]
            if len(recent) < converge or newest.index(min(newest)) != 0:
                continue
            started = overwritten = recent[0]
            rim = sum(newest) / converge * (1 + ratio)
            if tolerance < converge:
                merged += recent[1 : 1 + converge - tolerance]
            elif tolerance > converge:
                fill = window[: tolerance - converge + 1]
                from_ = 0
                for i in reversed(range(len(fill))):
                    if losses[fill[i]] > rim:
                        from_ = i + 1
                        break
                merged += fill[from_ + 1 :]
        elif window[0] >= started:
            if min(losses[i] for i in window) > rim:
                dead = True
            else:
                merged.append(window[0])
        del loss
    if started is None:
        return [recent[-1]]
    if not dead:
        window = window[1:]
        while window and min(losses[i] for i in window) <= rim:
            merged.append(window.pop(0))
    return merged or [overwritten]


def random_series(seed):
    rng = random.Random(seed)
    low = rng.choice([0.3, 0.9, 1.0])
    return [rng.choice([rng.uniform(low, 1.5), 1.0]) for _ in range(rng.randint(1, 22))]  # with ties


@pytest.mark.parametrize("converge", [1, 2, 3, 5])
@pytest.mark.parametrize("tolerance", [1, 2, 3, 6])
def test_random_series(converge, tolerance):
    outcomes = set()
    for seed in range(60):
        losses = random_series(seed)
        rules = {"converge": converge, "tolerance": tolerance, "ratio": 0.15}
        plain, released = swad(losses, **rules), swad(losses, exact_repo=True, **rules)
        expected = plainly(losses, *rules.values())
        assert valley(plain)["merged"] == expected
        merged = as_released(losses, *rules.values())
        assert valley(released)["merged"] == (merged if valley(released)["start"] is not None else [])
        assert_mean_of(plain.result(), expected or [len(losses) - 1], follows=(expected or [len(losses) - 1])[-1])
        assert_mean_of(released.result(), merged, follows=merged[-1])
        outcomes |= {"alive" if not valley(plain)["dead"] else "dead", "differ" if merged != expected else "same"}
    assert outcomes >= {"alive", "dead"} and ("differ" in outcomes or converge == 1)  # the quirks bite


@pytest.mark.parametrize("exact_repo", [False, True])
@pytest.mark.parametrize("length", [2, 6, 10])
def test_swad_goes_on_from_any_state(exact_repo, length):
    spec = AverageSpec(kind="swad", every=2, converge=3, tolerance=3, exact_repo=exact_repo)
    losses = {2 * index: loss for index, loss in enumerate(SERIES[:length])}
    steps = range(2 * length)  # the last segment stays unfinished
    straight = observe(averages.build(spec, switch=None), steps, losses)
    broken = observe(averages.build(spec, switch=None), steps, losses, each=lambda a, _: reloaded(a, spec))
    assert broken.facts() == straight.facts()
    assert all(torch.equal(value, broken.result()[name]) for name, value in straight.result().items())


@pytest.mark.parametrize("exact_repo", [False, True])
def test_a_result_changes_nothing(exact_repo):
    def look(average, step):
        del step
        first, facts = copy.deepcopy(average.result()), copy.deepcopy(average.facts())
        assert all(torch.equal(value, average.result()[name]) for name, value in first.items())
        assert average.facts() == facts
        return average

    fields = {"kind": "swad", "converge": 3, "tolerance": 3, "exact_repo": exact_repo}
    losses = dict(enumerate(SERIES))
    watched = observe(averages.build(AverageSpec(**fields), switch=None), range(10), losses, each=look)
    alone = swad(SERIES, **{k: v for k, v in fields.items() if k != "kind"})
    assert all(torch.equal(value, alone.result()[name]) for name, value in watched.result().items())
    assert watched.facts() == alone.facts()


def test_segments_weigh_the_same_and_each_is_the_mean_of_its_iterates():
    average = swad([1.0, 1.1, 1.2], every=4, converge=3, tolerance=3)  # segments of 1, 4 and 4 steps
    segments = [arithmetic_mean(steps)["w"] for steps in ([0], range(1, 5), range(5, 9))]
    torch.testing.assert_close(average.result()["w"], torch.stack(segments).mean(0), rtol=1e-12, atol=1e-12)
    assert (valley(average)["start"], valley(average)["end"]) == (0, 8)


def test_swad_before_any_evaluation_and_validation_only_where_it_counts():
    asked = []
    average = averages.build(AverageSpec(kind="swad", every=5, converge=1, tolerance=1), switch=None)
    for step in range(7, 20):
        average.update(weights(step), step, lambda step=step: asked.append(step) or 1.0 + math.exp(step))
        if step == 9:
            assert_mean_of(average.result(), [7, 8, 9], follows=9)
            assert valley(average) == {"start": None, "end": None, "threshold": None, "dead": False, "merged": []}
    assert asked == [10, 15]  # begun at the first, dead at the second, and not asked again
    assert valley(average)["dead"]
