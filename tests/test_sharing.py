"""Measurements in units: shared by processes, resumed from any instant, and planned once."""

import multiprocessing
import os

import pytest
from stores import ERM, PLACE, PROBE, SIZES, child, content, copied, flip, forkserver, refuses, trained

from flatlab import files
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs import worker as jobs_worker
from flatlab.measure.runner import measure
from flatlab.metrics.flatness import pilot
from flatlab.metrics.flatness import sampler as flatness_sampler
from flatlab.models.networks import Network
from flatlab.store.runs import RunStore


@pytest.fixture(scope="module", autouse=True)
def server():
    forkserver()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A trained run."""
    return trained(tmp_path_factory.mktemp("store"), ERM)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The same, measured by one undisturbed process."""
    store = copied(store, tmp_path_factory.mktemp("whole") / "store")
    measure(store.run(ERM), LONG, PLACE)
    measure(store.run(ERM), AUTO, PLACE)
    return store


LONG = PROBE.replace(num_samples=None, block_size=4, rel_error=0.0, abs_error=1e-9, budget=3_000, images=12)
AUTO = PROBE.replace(radii="auto", num_samples=None, rel_error=0.3, images=16)


def _work(store, todo):
    events = []
    jobs_worker.work(todo, store, PLACE, emit=events.append)
    return events


def _errors(events):
    return {event["job"]: event["error"] for event in events if "error" in event}


def _units(measurement):
    """The visits' units; that of the slopes comes before them."""
    return sorted(path.name for path in measurement.path.glob("unit-*_*"))


def _fills(root, tally, barrier):
    evaluate = flatness_sampler.Sampler.evaluate

    def counted(sampler, plans, visits):
        with open(tally, "a") as file:
            file.write(f"{os.getpid()} {visits.start}\n")
        return evaluate(sampler, plans, visits)

    flatness_sampler.Sampler.evaluate = counted
    barrier.wait()
    store = RunStore(root)
    assert _errors(_work(store, jobs_plan.missing(store, [], [(ERM, LONG)], sizes=SIZES))) == {}


@pytest.mark.slow
def test_idle_workers_join_a_measurement_and_no_unit_is_made_twice(store, whole, tmp_path):
    shared = copied(store, tmp_path / "shared")
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    workers = [child(_fills, shared.root, tmp_path / "tally", barrier) for _ in range(2)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    made = [line.split() for line in (tmp_path / "tally").read_text().splitlines()]
    measurements = [each.run(ERM).measurement(LONG) for each in (whole, shared)]
    assert _units(measurements[0]) == _units(measurements[1]) and len(made) == len(_units(measurements[0])) > 8
    assert len({unit for _, unit in made}) == len(made)
    assert len({process for process, _ in made}) == 2
    assert content(measurements[0]) == content(measurements[1])


def test_a_measurement_that_fails_for_who_joined_is_given_up(store, tmp_path, monkeypatch):
    store = copied(store, tmp_path / "store")
    monkeypatch.setattr("flatlab.measure.runner.measure", lambda *_, **__: 1 / 0)
    with store.run(ERM).measurement(LONG).claim():
        (error,) = _errors(_work(store, jobs_plan.missing(store, [], [(ERM, LONG)], sizes=SIZES))).values()
    assert error == "ZeroDivisionError: division by zero (a bug in flatlab)"


# --- resuming


def _dies_after(monkeypatch, calls):
    """Interrupt the network at its n-th forward pass, as Ctrl-C would."""
    forward, made = Network.forward, []

    def limited(self, x):
        made.append(len(x))
        if len(made) > calls:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(Network, "forward", limited)


def test_an_interrupted_measurement_is_not_finished_and_goes_on(store, whole, tmp_path, monkeypatch):
    again = copied(store, tmp_path / "again")
    measurement, kept = again.run(ERM).measurement(LONG), []
    for calls in (208, 120, 160):  # the slopes take 128, once
        with monkeypatch.context() as patch:
            _dies_after(patch, calls)
            with pytest.raises(KeyboardInterrupt):
                measure(again.run(ERM), LONG, PLACE)
        assert not measurement.done
        kept.append(len(_units(measurement)))
    assert kept[0] < kept[-1] < len(_units(whole.run(ERM).measurement(LONG)))
    measure(again.run(ERM), LONG, PLACE)
    assert content(measurement) == content(whole.run(ERM).measurement(LONG))


def test_a_kept_plan_is_not_made_again(whole, tmp_path, monkeypatch):
    mine = copied(whole, tmp_path / "mine")
    measurement = mine.run(ERM).measurement(AUTO)
    assert {"unit-plan.safetensors", "unit-radii.safetensors"} < {path.name for path in measurement.path.glob("unit-*")}
    before = content(measurement)
    _, facts = files.load_arrays(measurement.result)
    for path in [measurement.path / "done", measurement.result, *measurement.path.glob("unit-*_*")]:
        path.unlink()
    monkeypatch.setattr(pilot, "run_pilot", None)
    monkeypatch.setattr(pilot, "span", None)
    measure(mine.run(ERM), AUTO, PLACE)
    assert content(measurement) == before and facts["stopped"] and len(facts["plans"]) == pilot.PLACES


@pytest.mark.slow
def test_a_damaged_plan_is_named(whole, tmp_path):
    mine = copied(whole, tmp_path / "mine")
    measurement = mine.run(ERM).measurement(AUTO)
    (measurement.path / "done").unlink()
    flip(measurement.unit("plan"), 8 * measurement.unit("plan").stat().st_size - 3)
    refuses(lambda: measure(mine.run(ERM), AUTO, PLACE), measurement.unit("plan"), "is damaged", "Delete it")


def test_locks_are_no_part_of_a_measurement(whole):
    measurement = whole.run(ERM).measurement(LONG)
    assert list(measurement.path.glob(".*.lock"))
    assert not [name for name in measurement.files() if "lock" in name]
    assert whole.faults() == []
