"""Averages against plain arithmetic on recorded weights, and SWAD against scripted series and a simulation."""

import copy
import functools
import json
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from flatlab.errors import UserError
from flatlab.report import valleys
from flatlab.specs.run import AverageSpec, RunSpec
from flatlab.tensors import means as tensors_means
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


def bma(beta, updates=10):
    return averages.build(AverageSpec(kind="bma", beta=beta), switch=None, updates=updates)


def test_bma_weighs_the_start_and_each_update_by_the_density_of_a_beta_distribution():
    assert_mean_of(observe(bma(1.0), range(-1, 10)).result(), range(-1, 10), follows=9)  # Beta(1, 1) is the plain mean
    for beta in (0.5, 2.0):
        average = bma(beta, updates=4)
        for step in range(-1, 4):
            average.update({"w": torch.eye(5, dtype=torch.float64)[step + 1]}, step, lambda: NEVER)
        units = average.result()["w"].numpy()
        density = stats.beta(beta, beta).pdf((np.arange(5) + 0.5) / 5)  # CLIPood's code
        np.testing.assert_allclose(units, density / density.sum(), rtol=1e-12)
        assert units.sum() == pytest.approx(1, abs=1e-12)
        spec = AverageSpec(kind="bma", beta=beta)
        fresh = averages.build(spec, switch=None, updates=4)
        fresh.load(average.save())
        assert np.array_equal(fresh.result()["w"].numpy(), units)


def test_sma_before_its_start_is_the_last_iterate():
    average = observe(averages.build(AverageSpec(kind="sma", start=7), switch=None), range(4))
    assert torch.equal(average.result()["w"], weights(3)["w"])
    assert average.facts() == {"averaged": 0}
    assert_mean_of(observe(average, [5, 6]).result(), [5, 6], follows=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_mean_of_equal_weights_is_the_identity(dtype):
    w = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)}
    mean = tensors_means.Mean()
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
    with pytest.raises(UserError, match=rf"^{kind.upper()} must start at a step <= 5, got 9\.$"):
        RunSpec.make(**fields, steps=5, lr=0.1, average=AverageSpec(kind=kind, start=9))


# --- SWAD --------------------------------------------------------------------------------------------------------

SERIES = [1.0, 0.6, 0.5, 0.55, 0.52, 0.5, 0.8, 0.9, 0.95, 1.0]
RULES = ["paper", "released"]


def swad(losses, *, every=1, more=0, shown=None, **fields):
    """Run SWAD on a series of validation losses, one at each evaluation, and `more` steps after the last."""
    average = averages.build(AverageSpec(kind="swad", every=every, **fields), switch=None)
    for step in range(every * (len(losses) - 1) + 1 + more):
        average.update((shown or weights)(step), step, lambda step=step: losses[step // every])
    return average


def valley(average):
    return average.facts()["valley"]


def test_the_scripted_series():
    found = valley(swad(SERIES, converge=3, tolerance=3))
    assert found.pop("threshold") == pytest.approx(1.3 * (0.5 + 0.55 + 0.52) / 3)
    assert found == {"start": 2, "end": 5, "dead": True, "merged": [2, 3, 4, 5], "span": [2, 5]}
    assert not valley(swad(SERIES[:8], converge=3, tolerance=3))["dead"]
    assert valley(swad(SERIES[:9], converge=3, tolerance=3))["dead"]


@pytest.mark.parametrize(
    ("losses", "converge", "tolerance", "merged", "dead"),
    [
        ([5, 4, 3, 2, 1], 3, 6, [0, 1, 2, 3, 4], None),  # never begun: t_s = 0 and t_e = T
        ([1, 2], 3, 6, [0, 1], None),  # too few evaluations
        ([1.0, 1.1, 1.2, 1.1, 1.0], 3, 6, [0, 1, 2, 3, 4], False),
        ([1.0, 1.1, 1.2, 1.1, 9.0], 3, 6, [0, 1, 2, 3, 4], False),  # alive at the end: t_e = T
        ([9, 1.0, 1.1, 1.2, 9, 1.0], 3, 2, [1, 2, 3, 4, 5], False),  # one above the threshold is forgiven
        ([1.0, 1.1, 1.2, 9, 9, 9, 9, 9, 9], 3, 6, [0, 1, 2], True),
        ([9, 8, 7, 1.0, 1.1, 1.2, 9, 9, 9, 9, 9, 9], 3, 6, [3, 4, 5], True),
        ([1.0, 1.1, 2.0, 9, 9, 9, 9], 3, 3, [0, 1], True),  # t_e = i - N_e may lie before the start was seen
        ([1.0, 1.1, 1.2, 9], 3, 1, [0, 1, 2], True),
        ([1.0, NEVER, 1.2, 1.0, 1.1, 1.2], 3, 3, [3, 4, 5], False),  # no valley over a loss that is none
        ([1.0, 1.1, 1.2, NEVER, NEVER, NEVER], 3, 3, [0, 1, 2], True),
    ],
)
def test_algorithm_1(losses, converge, tolerance, merged, dead):
    average = swad(losses, converge=converge, tolerance=tolerance)
    found = valley(average)
    assert (found["merged"], found["dead"], found["span"]) == (merged, bool(dead), [merged[0], merged[-1]])
    assert_mean_of(average.result(), merged, follows=merged[-1])
    began = dead is not None
    assert (found["start"], found["end"]) == ((merged[0], merged[-1]) if began else (None, None))


def realistic(rng):
    """Return validation losses as trainings have them: a fall, noise, and often a rise; some with ties."""
    length, floor, noise = rng.randint(1, 40), rng.uniform(0.2, 0.6), rng.choice([0.01, 0.05, 0.2])
    pace, rise = rng.uniform(0.05, 1.0), rng.choice([0.0, 0.0, 0.01, 0.05])
    losses = [floor + 1.5 * math.exp(-pace * i) + rise * i + rng.uniform(0, noise) for i in range(length)]
    return [round(loss, rng.choice([1, 2, 9])) for loss in losses]


def algorithm_1(losses, every, last, *, converge, tolerance, ratio):
    """Cha et al. 2021, Algorithm 1, read off the page: steps t_s to t_e, and whether a valley began.

    i counts evaluations, the first being 0; the one of number i speaks of the steps after that of number i - 1.
    """
    begins = [0, *(every * (i - 1) + 1 for i in range(1, len(losses)))]
    t_s, t_e, limit = 0, last, None
    for i in range(len(losses)):
        if limit is None:
            if i - converge + 1 < 0:
                continue
            window = [losses[i - j] for j in range(converge)]
            if losses[i - converge + 1] == min(window):
                t_s, limit = begins[i - converge + 1], (1 + ratio) * sum(reversed(window)) / converge
        elif limit < min(losses[i - j] for j in range(tolerance) if i - j >= 0):
            t_e = every * (i - tolerance)
            break
    return t_s, t_e, limit is not None


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
        return [recent[-1]], False
    if not dead:
        window = window[1:]
        while window and min(losses[i] for i in window) <= rim:
            merged.append(window.pop(0))
    return merged or [overwritten], True


@functools.cache
def moments(step):
    """Weights whose mean tells which steps are in it."""
    return {"w": torch.tensor([step, step**2, math.sin(step)], dtype=torch.float64)}


def mean_moments(parts):
    """The mean over segments, each the mean of its steps."""
    means = [sum(moments(step)["w"] for step in steps) / len(steps) for steps in parts]
    return sum(means) / len(means)


@pytest.mark.parametrize("block", range(4))
def test_both_rules_on_2000_series_equal_a_plain_reading_of_paper_and_code(block):
    seen = set()
    for seed in range(500 * block, 500 * (block + 1)):
        rng = random.Random(seed)
        losses, every, more = realistic(rng), rng.choice([1, 1, 2, 3]), rng.choice([0, 1])
        rules = {"converge": rng.choice([1, 2, 3, 3, 5]), "tolerance": rng.choice([1, 2, 3, 6, 6])}
        rules |= {"ratio": rng.choice([0.05, 0.2, 0.3])}
        last = every * (len(losses) - 1) + (more if every > 1 else 0)
        run = {"every": every, "more": last - every * (len(losses) - 1), "shown": moments, **rules}
        plain, released = swad(losses, **run), swad(losses, rule="released", **run)

        t_s, t_e, began = algorithm_1(losses, every, last, **rules)
        found = valley(plain)
        assert (found["span"], found["start"] is not None) == ([t_s, t_e], began), seed
        expected = mean_moments([range(t_s, t_e + 1)])
        torch.testing.assert_close(plain.result()["w"], expected, rtol=1e-10, atol=1e-10)

        merged, converged = as_released(losses, *rules.values())
        theirs = valley(released)
        assert (theirs["start"] is not None, theirs["merged"]) == (converged, merged if converged else []), seed
        segments = [range(every * (i - 1) + 1, every * i + 1) if i else [0] for i in merged]
        torch.testing.assert_close(released.result()["w"], mean_moments(segments), rtol=1e-10, atol=1e-10)
        seen |= {"dead" if found["dead"] else "alive" if began else "none"}
        seen |= {"differ" if not torch.allclose(plain.result()["w"], released.result()["w"]) else "same"}
    assert seen == {"dead", "alive", "none", "differ", "same"}


@pytest.mark.parametrize("loss", [0.1, 0.6, 1.1])
def test_a_loss_that_stands_still_never_leaves_its_valley(loss):
    average = swad([loss] * 12, converge=7, tolerance=2, ratio=0.0)  # the mean of equals is off by rounding
    assert (valley(average)["dead"], valley(average)["span"]) == (False, [0, 11])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [2, 6, 10])
def test_swad_goes_on_from_any_state(rule, length):
    spec = AverageSpec(kind="swad", every=2, converge=3, tolerance=3, rule=rule)
    losses = {2 * index: loss for index, loss in enumerate(SERIES[:length])}
    steps = range(2 * length)  # the last segment stays unfinished
    straight = observe(averages.build(spec, switch=None), steps, losses)
    broken = observe(averages.build(spec, switch=None), steps, losses, each=lambda a, _: reloaded(a, spec))
    assert broken.facts() == straight.facts()
    assert all(torch.equal(value, broken.result()[name]) for name, value in straight.result().items())


@pytest.mark.parametrize("rule", RULES)
def test_a_result_changes_nothing(rule):
    def look(average, step):
        del step
        first, facts = copy.deepcopy(average.result()), copy.deepcopy(average.facts())
        assert all(torch.equal(value, average.result()[name]) for name, value in first.items())
        assert average.facts() == facts
        return average

    fields = {"kind": "swad", "converge": 3, "tolerance": 3, "rule": rule}
    losses = dict(enumerate(SERIES))
    watched = observe(averages.build(AverageSpec(**fields), switch=None), range(10), losses, each=look)
    alone = swad(SERIES, **{k: v for k, v in fields.items() if k != "kind"})
    assert all(torch.equal(value, alone.result()[name]) for name, value in watched.result().items())
    assert watched.facts() == alone.facts()


def test_iterates_weigh_the_same_by_the_paper_and_segments_by_its_code():
    rules = {"every": 4, "converge": 3, "tolerance": 3}  # segments of 1, 4, 4 and, unfinished, 2 steps
    average = swad([1.0, 1.1, 1.2], **rules, more=2)
    assert_mean_of(average.result(), range(11), follows=10)
    assert (valley(average)["start"], valley(average)["end"]) == (0, 10)
    released = swad([1.0, 1.1, 1.2, 1.2], **rules, rule="released", more=2)
    segments = [arithmetic_mean(steps)["w"] for steps in ([0], range(1, 5), range(5, 9), range(9, 13))][1:]
    assert valley(released)["merged"] == [1, 2, 3]
    torch.testing.assert_close(released.result()["w"], torch.stack(segments).mean(0), rtol=1e-12, atol=1e-12)


def test_swad_before_any_evaluation_and_validation_only_where_it_counts():
    asked = []
    average = averages.build(AverageSpec(kind="swad", every=5, converge=1, tolerance=1), switch=None)
    for step in range(7, 20):
        average.update(weights(step), step, lambda step=step: asked.append(step) or 1.0 + math.exp(step))
        if step == 9:
            assert_mean_of(average.result(), [7, 8, 9], follows=9)
            assert (valley(average)["start"], valley(average)["span"]) == (None, [7, 9])
    assert asked == [10, 15]  # begun at the first, dead at the second, and not asked again
    assert valley(average)["dead"]


class Finished:
    """What `valleys` reads of a run."""

    def __init__(self, spec, average):
        self.spec, self.average = spec, average

    def rows(self):
        return [{"step": 0, **self.average.facts()}]


@pytest.mark.parametrize(("rule", "said"), [("paper", "all iterates"), ("released", "only the last segment")])
def test_it_is_said_where_no_valley_began(rule, said):
    fields = {"dataset": "digits", "held_out": "rot0", "image_size": 16, "model": "digits-cnn", "eval_every": 1}
    spec = RunSpec(**fields, steps=5, lr=0.1, average=AverageSpec(kind="swad", rule=rule))
    falling, begun = (Finished(spec.replace(seed=i), swad(s, rule=rule)) for i, s in enumerate(([3, 2, 1], SERIES)))
    (remark,) = valleys.remarks([falling, begun, Finished(spec.replace(average=AverageSpec()), falling.average)])
    assert "no valley began in 1 of 2 runs" in remark and "rot0, seed 0)" in remark and said in remark
    assert valleys.remarks([begun]) == []
    assert valleys.sentence(valleys.of(falling), rule).startswith("no valley began: the mean of ")
    assert "begins at step 2" in valleys.sentence(valleys.of(begun), rule)
