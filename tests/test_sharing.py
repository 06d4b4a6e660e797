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


def _units(probe):
    """The visits' units; that of the slopes comes before them."""
    return sorted(path.name for path in probe.path.glob("unit-*_*"))


def _fills(root, tally, barrier):
    walk = flatness_sampler.Sampler.walk

    def counted(sampler, plans, visits):
        with open(tally, "a") as file:
            file.write(f"{os.getpid()} {visits.start}\n")
        return walk(sampler, plans, visits)

    flatness_sampler.Sampler.walk = counted
    barrier.wait()
    store = RunStore(root)
    assert _errors(_work(store, jobs_plan.missing(store, [], [(ERM, LONG)], sizes=SIZES))) == {}


def test_idle_workers_join_a_measurement_and_no_unit_is_made_twice(store, whole, tmp_path):
    shared = copied(store, tmp_path / "shared")
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    workers = [child(_fills, shared.root, tmp_path / "tally", barrier) for _ in range(2)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    made = [line.split() for line in (tmp_path / "tally").read_text().splitlines()]
    probes = [each.run(ERM).probe(LONG) for each in (whole, shared)]
    assert _units(probes[0]) == _units(probes[1]) and len(made) == len(_units(probes[0])) > 8
    assert len({unit for _, unit in made}) == len(made)
    assert len({process for process, _ in made}) == 2
    assert content(probes[0]) == content(probes[1])


def test_a_measurement_that_fails_for_who_joined_is_given_up(store, tmp_path, monkeypatch):
    store = copied(store, tmp_path / "store")
    monkeypatch.setattr("flatlab.measure.runner.measure", lambda *_, **__: 1 / 0)
    with store.run(ERM).probe(LONG).claim():
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
    probe, kept = again.run(ERM).probe(LONG), []
    for calls in (208, 120, 160):  # the slopes take 128, once
        with monkeypatch.context() as patch:
            _dies_after(patch, calls)
            with pytest.raises(KeyboardInterrupt):
                measure(again.run(ERM), LONG, PLACE)
        assert not probe.done
        kept.append(len(_units(probe)))
    assert kept[0] < kept[-1] < len(_units(whole.run(ERM).probe(LONG)))
    measure(again.run(ERM), LONG, PLACE)
    assert content(probe) == content(whole.run(ERM).probe(LONG))


def test_a_kept_plan_is_not_made_again(whole, tmp_path, monkeypatch):
    mine = copied(whole, tmp_path / "mine")
    probe = mine.run(ERM).probe(AUTO)
    assert {"unit-plan.safetensors", "unit-radii.safetensors"} < {path.name for path in probe.path.glob("unit-*")}
    before = content(probe)
    _, facts = files.load_arrays(probe.result)
    for path in [probe.path / "done", probe.result, *probe.path.glob("unit-*_*")]:
        path.unlink()
    monkeypatch.setattr(pilot, "fly", None)
    monkeypatch.setattr(pilot, "span", None)
    measure(mine.run(ERM), AUTO, PLACE)
    assert content(probe) == before and facts["stopped"] and len(facts["plans"]) == pilot.PLACES


def test_a_damaged_plan_is_named(whole, tmp_path):
    mine = copied(whole, tmp_path / "mine")
    probe = mine.run(ERM).probe(AUTO)
    (probe.path / "done").unlink()
    flip(probe.unit("plan"), 8 * probe.unit("plan").stat().st_size - 3)
    refuses(lambda: measure(mine.run(ERM), AUTO, PLACE), probe.unit("plan"), "is damaged", "Delete it")


def test_locks_are_no_part_of_a_measurement(whole):
    probe = whole.run(ERM).probe(LONG)
    assert list(probe.path.glob(".*.lock"))
    assert not [name for name in probe.files() if "lock" in name]
    assert whole.faults() == []
