"""The store: merging and removing are careful, and data stay the same."""

import json
import shutil
from dataclasses import replace

import pytest
from stores import GROUP, PLACE, PROBE, content, copied, flip, refuses, spec, trained

from flatlab import build
from flatlab.measure import measure
from flatlab.runs import RunStore
from flatlab.train.loop import train

RUN, OTHER = GROUP[0], GROUP[3]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two runs, one of them measured."""
    store = trained(tmp_path_factory.mktemp("made"), RUN, OTHER)
    measure(store.run(RUN), PROBE, PLACE)
    return store


@pytest.fixture
def store(made, tmp_path):
    return copied(made, tmp_path / "store")


def test_other_data_are_refused(store, monkeypatch):
    run, old = store.run(RUN), build.domains
    monkeypatch.setattr(build, "domains", lambda *given: _renamed(old(*given)))
    same = "The data of digits differ from those that run"
    refuses(lambda: measure(run, PROBE.replace(seed=1), PLACE), same, RUN.digest, "another --store")
    (run.path / "done").unlink()
    refuses(lambda: train([RUN], store, PLACE), same, RUN.digest)
    refuses(lambda: train([spec("SWA")], store, PLACE), same, RUN.digest)  # of the same trajectory
    child = spec("QT-DoG")
    shutil.copy(trained(store.root / "x", RUN, forks={6}).run(RUN).state("fork-6"), run.state("fork-6"))
    refuses(lambda: train([child], store, PLACE), same, RUN.digest)


def _renamed(domains):
    data = replace(domains.data)
    object.__setattr__(data, "fingerprint", "f" * 64)
    return replace(domains, data=data)


# --- find, remove, merge


def test_find(store):
    assert store.find(RUN.digest[:9]).spec == RUN
    refuses(lambda: store.find("x"), f"No run in {store.root} begins with 'x'; `flatlab runs list` shows them all.")
    refuses(lambda: store.find(""), f"2 runs in {store.root} begin with ''")
    (store.run(OTHER).path / "spec.json").write_text("{")
    assert store.find(RUN.digest).spec == RUN
    refuses(lambda: store.find(OTHER.digest), store.run(OTHER).path / "spec.json", "is damaged")


def test_remove(store):
    run = store.run(RUN)
    for entry in (run, run.probe(PROBE)):
        with entry.claim() as free:
            assert free
            refuses(lambda: store.remove(run), f"Run {RUN.digest} is being worked on by another process")
        assert run.done
        assert store.faults() == []
    store.remove(run)
    assert [each.spec for each in store.runs()] == [OTHER]
    assert sorted(path.name for path in store.root.iterdir()) == [OTHER.digest]
    train([RUN], store, PLACE)
    assert run.done


def test_a_removal_that_is_cut_short_leaves_no_half_run(store, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    store.remove(store.run(RUN))
    assert [each.spec for each in store.runs()] == [OTHER]
    assert store.faults() == []


def test_merge(made, tmp_path):
    store = RunStore(tmp_path / "store")
    assert store.merge(made) == {"runs": 2, "probes": 1, "here already": 0, "differ here": 0}
    assert store.merge(made) == {"runs": 0, "probes": 0, "here already": 3, "differ here": 0}
    for run in (RUN, OTHER):
        assert content(store.run(run)) == content(made.run(run))
        assert store.run(run).provenance == made.run(run).provenance
    assert content(store.run(RUN).probe(PROBE)) == content(made.run(RUN).probe(PROBE))


def test_merge_takes_new_probes_of_runs_that_are_here(made, store):
    shutil.rmtree(store.run(RUN).path / "probes")
    assert store.merge(made) == {"runs": 0, "probes": 1, "here already": 2, "differ here": 0}
    assert content(store.run(RUN).probe(PROBE)) == content(made.run(RUN).probe(PROBE))


def test_merge_leaves_probes_of_another_network(made, store):
    run = store.run(RUN)
    shutil.rmtree(run.path / "probes")
    run.write_log([])  # as if trained elsewhere
    run.finish()
    assert store.merge(made) == {"runs": 0, "probes": 0, "here already": 2, "differ here": 1}
    assert run.probes() == []


def test_merge_copies_only_what_is_finished(store, tmp_path):
    (store.run(OTHER).path / "done").unlink()
    (store.run(RUN).probe(PROBE).path / "done").unlink()
    ours = RunStore(tmp_path / "ours")
    assert ours.merge(store) == {"runs": 1, "probes": 0, "here already": 0, "differ here": 0}
    assert [run.spec for run in ours.runs()] == [RUN]


def test_mergerefuses(store, tmp_path):
    ours = RunStore(tmp_path / "ours")
    refuses(lambda: ours.merge(RunStore(tmp_path / "none")), f"{tmp_path / 'none'} holds no run")
    with ours.run(RUN).claim(), ours.run(OTHER).claim():
        refuses(lambda: ours.merge(store), "is being worked on by another process; merge when it is finished")
    flip(store.run(RUN).checkpoint("last"), 9_000)
    refuses(lambda: ours.merge(store), "Not merged", store.run(RUN).checkpoint("last"), "is damaged")
    assert not ours.run(RUN).done


def test_a_claim_clears_what_a_killed_write_left_but_not_what_others_write(store):
    run, theirs = store.run(RUN), store.run(RUN).probe(PROBE)
    leftovers = [run.path / ".log.jsonl.1.tmp", run.path / "state" / ".resume.safetensors.1.tmp"]
    writing = theirs.path / ".block-0000.safetensors.1.tmp"
    for path in (*leftovers, writing):
        path.touch()
    with run.claim() as free:
        assert free
    assert not any(path.exists() for path in leftovers)
    assert writing.exists()
    with theirs.claim():
        assert not writing.exists()


def test_spec_and_done_are_plain_json(store):
    run = store.run(RUN)
    assert json.loads((run.path / "spec.json").read_text()) == RUN.model_dump(mode="json")
    assert set(json.loads((run.path / "done").read_text())["files"]) == set(run.files())
    assert "provenance.json" not in run.files()
