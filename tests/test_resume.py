"""Equal bytes: alone or in company, forked or not, killed or not."""

import os
import random
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from stores import (
    GROUP,
    LAST,
    PLACE,
    PROBE,
    SIZES,
    SWITCH,
    content,
    forked,
    forkserver,
    run_child,
    spec,
    trained,
    watch,
)

from flatlab import files
from flatlab.errors import UserError
from flatlab.jobs import plan as jobs_plan
from flatlab.measure.runner import measure
from flatlab.metrics.flatness.sampler import UNIT
from flatlab.store.merging import merge
from flatlab.store.runs import Run, RunStore
from flatlab.train import loop
from flatlab.train.loop import train

STEPS = LAST + 1


@pytest.fixture(scope="module", autouse=True)
def server():
    forkserver()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("together"), *GROUP, forks={SWITCH})


@pytest.mark.parametrize("wanted", GROUP, ids=lambda run: run.average.kind)
def test_a_run_in_company_is_the_run_alone(together, tmp_path, wanted):
    assert content(trained(tmp_path, wanted).run(wanted)) == content(together.run(wanted))


def test_runs_of_one_trajectory_differ(together):
    lasts = {together.run(run).checkpoint("last").read_bytes() for run in GROUP}
    assert len(lasts) == len(GROUP)


FORKED = {
    "QT-DoG": spec("QT-DoG"),
    "freeze": spec("freeze"),
    "release-parity": spec("release-parity"),
    "sam-lsq": spec("QT-DoG", step="sam"),
    "lsq-swad": spec("QT-DoG", average="swad"),
    "lsq-sma": spec("QT-DoG", average="sma"),
    "sagm-lsq": spec("QT-DoG", step="sagm"),
    "saq-lsq": spec("SAQ"),
    "mixstyle-sam-lsq": spec("MixStyle+QT-DoG", step="sam"),
}


@pytest.mark.parametrize("wanted", FORKED.values(), ids=FORKED)
def test_a_forked_run_is_the_run_alone(tmp_path, wanted):
    rows = forked(tmp_path, wanted).rows()
    assert [row["looks"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_fork_is_kept_where_nobody_trains_the_parent_itself(together, tmp_path):
    store = trained(tmp_path, GROUP[1], forks={SWITCH})
    train([FORKED["QT-DoG"]], store, PLACE)
    assert store.run(FORKED["QT-DoG"]).provenance["sessions"][0]["from_step"] == SWITCH
    train([GROUP[0]], store, PLACE)
    for run in GROUP[:2]:
        assert content(store.run(run)) == content(together.run(run))


@pytest.mark.slow
def test_a_fresh_process_makes_the_same_bytes(together, tmp_path):
    code = "import sys; from stores import *; trained(sys.argv[1], *GROUP)"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True, timeout=60)
    for run in GROUP:
        assert content(RunStore(tmp_path).run(run)) == content(together.run(run))


def _train(root, specs, tally, every=None, *death):
    watch(tally, *death)
    if every is not None:
        loop.SAVE_SECONDS = every
    train(specs, RunStore(root), PLACE)


def _measure(root, specs, tally, *death):
    watch(tally, *death)
    measure(RunStore(root).run(specs[0]), PROBE, PLACE)


def _next_step(run):
    state = run.state("resume")
    return files.load_arrays(state)[1]["next_step"] if state.exists() else 0


def _visits(measurement):
    return min(PROBE.num_samples, UNIT * len(list(measurement.path.glob("unit-*"))))


def _size(tally):
    return tally.stat().st_size if tally.exists() else 0


def _deaths(seed, **spans):
    """Draw where the children die: three calls of each point, in any order."""
    draws = random.Random(seed)
    drawn = [(point, call) for point, calls in spans.items() for call in draws.sample(calls, 3)]
    return draws.sample(drawn, len(drawn))


def _suffer(start, tally, kept, deaths):
    """Start a child for each death, until one lives to the end; yield what each of the dead had lost."""
    for death in [*deaths, ()]:
        made, had = _size(tally), kept()
        code = start(*death)
        made = _size(tally) - made
        if code == 0:
            yield had + made
            return
        assert code == -9, death
        yield had + made - kept()


SGD = {"optimizer": "sgd", "lr": 0.05, "schedule": "cosine", "warmup": 3, "clip_norm": 0.8}
KILLED = {
    "group": (GROUP, None, 4),  # a state at each evaluation only: each four steps
    "lsq-swad": ([spec("QT-DoG", average="swad")], 0.0, 1),  # a state at each step
    "sam-lsq-sma": ([spec("QT-DoG", average="sma", step="sam")], None, 4),
    "lsq, SGD on a clipped cosine": ([spec("QT-DoG").replace(**SGD)], None, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize(("specs", "every", "most"), KILLED.values(), ids=KILLED)
def test_training_killed_anywhere_goes_on_from_its_last_state(tmp_path, specs, every, most):
    tally, whole, store = tmp_path / "tally", trained(tmp_path / "whole", *specs), RunStore(tmp_path / "killed")
    deaths = _deaths(len(specs), step=range(2, 7), sync=range(1, 15), rename=range(1, 15))
    start = partial(run_child, _train, store.root, specs, tally, every)
    *lost, made = _suffer(start, tally, lambda: _next_step(store.run(specs[0])), deaths)
    assert len(lost) > 4
    assert 0 <= min(lost) < max(lost) <= most  # it went on from the last state
    assert made == STEPS  # and made what was left, not one step more
    for run in specs:
        assert content(store.run(run)) == content(whole.run(run))


def test_a_measurement_killed_anywhere_goes_on_from_its_last_unit(tmp_path):
    run = spec()
    tally, whole, store = tmp_path / "tally", trained(tmp_path / "whole", run), RunStore(tmp_path / "killed")
    merge(whole, store)
    measure(whole.run(run), PROBE, PLACE)
    measurement = store.run(run).measurement(PROBE)
    deaths = _deaths(1, ray=range(2, 11), sync=range(1, 6), rename=range(1, 6))
    *lost, made = _suffer(
        partial(run_child, _measure, store.root, [run], tally), tally, partial(_visits, measurement), deaths
    )
    assert len(lost) > 4
    assert 0 <= min(lost) < max(lost) <= UNIT
    assert made == PROBE.num_samples
    assert content(measurement) == content(whole.run(run).measurement(PROBE))


def test_killed_between_two_ends_the_state_stays_with_what_is_missing(tmp_path, together):
    """The leader keeps the state and is done last; what the next command asks for is led by it."""
    store, tally, dones = RunStore(tmp_path / "store"), tmp_path / "tally", 0
    assert run_child(_die_at_done, store.root, GROUP, tally) == -9
    dones = [store.run(run).done for run in GROUP]
    assert dones.count(True) == 2
    todo = jobs_plan.missing(store, GROUP[::-1], [], sizes=SIZES)
    made, start = _size(tally), _next_step(store.run(todo[0].runs[0]))
    assert start == LAST  # of 14 updates, 0 to 13, the last evaluation's state was after 12
    assert run_child(_train, store.root, todo[0].runs, tally) == 0
    assert _size(tally) - made == STEPS - start
    for run in GROUP:
        assert content(store.run(run)) == content(together.run(run))


def _die_at_done(root, specs, tally):
    watch(tally)
    finish, done = Run.finish, []

    def finish_two(run):
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(finish(run))

    Run.finish = finish_two
    train(specs, RunStore(root), PLACE)


def test_a_state_that_lacks_an_average_is_not_gone_on_from(tmp_path, together):
    store, pair = RunStore(tmp_path / "store"), [GROUP[0], GROUP[2]]
    assert run_child(_train, store.root, pair[:1], tmp_path / "tally", None, "step", 7) == -9
    assert _next_step(store.run(pair[0])) == 5
    train(pair, store, PLACE)
    first, second = store.run(pair[0]).provenance["sessions"]
    assert first["how"] == "begun"
    assert second["from_step"] == 0
    assert second["how"] == "begun again: the saved state lacks one of the averages"
    for run in pair:
        assert content(store.run(run)) == content(together.run(run))


def test_a_state_of_more_runs_serves_fewer(tmp_path, together):
    store = RunStore(tmp_path / "store")
    assert run_child(_train, store.root, GROUP, tmp_path / "tally", None, "step", 7) == -9
    train(GROUP[:1], store, PLACE)
    sessions = store.run(GROUP[0]).provenance["sessions"]
    assert [(each["from_step"], each["how"]) for each in sessions] == [(0, "begun"), (5, "resumed")]
    assert [each["to_step"] for each in sessions] == [5, STEPS]
    assert all(each["seconds"] > 0 for each in sessions)
    assert content(store.run(GROUP[0])) == content(together.run(GROUP[0]))


@pytest.mark.slow
def test_threads_are_recorded_and_used_again(tmp_path):
    store, run = RunStore(tmp_path / "store"), spec()
    store.run(run).create()
    store.run(run).note(threads=2)
    used, before = set(), torch.get_num_threads()
    train([run], store, PLACE, report=lambda *_: used.add(torch.get_num_threads()))
    assert used == {2} == {store.run(run).provenance["threads"]}
    measurement = store.run(run).measurement(PROBE)
    measurement.create()
    measurement.note(threads=2)
    used.clear()
    measure(store.run(run), PROBE, PLACE, report=lambda *_: used.add(torch.get_num_threads()))
    assert used == {2} == {measurement.provenance["threads"]}
    assert torch.get_num_threads() == before  # the caller's process keeps its own


def test_nothing_is_done_twice(tmp_path, monkeypatch):
    store = trained(tmp_path, GROUP[0])
    measure(store.run(GROUP[0]), PROBE, PLACE)
    monkeypatch.setattr(files, "write_bytes", None)
    train([GROUP[0]], store, PLACE)
    measure(store.run(GROUP[0]), PROBE, PLACE)


def test_a_run_that_is_not_finished_is_not_measured(tmp_path):
    with pytest.raises(UserError, match=f"Run {GROUP[0].digest} is not finished, or was removed; repeat"):
        measure(RunStore(tmp_path).run(GROUP[0]), PROBE, PLACE)
    assert not any(tmp_path.iterdir())
