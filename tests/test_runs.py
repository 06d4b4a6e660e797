"""The store: merging and removing are careful, and data stay the same."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import pytest
from stores import GROUP, PLACE, PROBE, content, copied, flip, refuses, spec, trained

from flatlab import files
from flatlab.loading import data as loading_data
from flatlab.measure.runner import measure
from flatlab.store import leftovers
from flatlab.store.merging import COUNTS, merge
from flatlab.store.runs import RunStore
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
    run, old = store.run(RUN), loading_data.domains
    monkeypatch.setattr(loading_data, "domains", lambda *given: _renamed(old(*given)))
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
    for entry in (run, run.measurement(PROBE)):
        with entry.claim() as free:
            assert free
            refuses(lambda: store.remove(run), f"Run {RUN.digest} is in use by another process")
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


def _merged(theirs, ours, *, refused=(), **counts):
    """Assert what a merge counts, and that it names these files, one a sentence."""
    found, sentences = merge(theirs, ours)
    assert found == {**dict.fromkeys(COUNTS, 0), **{name.replace("_", " "): count for name, count in counts.items()}}
    assert [str(name) in sentence for name, sentence in zip(refused, sentences, strict=True)] == [True] * len(refused)
    return sentences


def test_merge(made, tmp_path):
    store = RunStore(tmp_path / "store")
    _merged(made, store, runs=2, measurements=1)
    _merged(made, store, here_already=3)
    for run in (RUN, OTHER):
        assert content(store.run(run)) == content(made.run(run))
        assert store.run(run).provenance == made.run(run).provenance
    assert content(store.run(RUN).measurement(PROBE)) == content(made.run(RUN).measurement(PROBE))
    assert store.faults() == []


def test_merge_takes_new_measurements_of_runs_that_are_here(made, store):
    shutil.rmtree(store.run(RUN).path / "measurements")
    _merged(made, store, measurements=1, here_already=2)
    assert content(store.run(RUN).measurement(PROBE)) == content(made.run(RUN).measurement(PROBE))


def test_merge_leaves_what_is_of_another_network(made, store):
    run = store.run(RUN)
    shutil.rmtree(run.path / "measurements")
    run.write_log([])  # as if trained elsewhere
    run.finish()
    _merged(made, store, here_already=2, differ_here=1)
    assert run.measurements() == []


def test_merge_copies_only_what_done_vouches_for(store, tmp_path):
    (store.run(OTHER).path / "done").unlink()
    (store.run(RUN).measurement(PROBE).path / "done").unlink()
    (store.run(RUN).path / "notes.txt").write_text("mine")
    ours = RunStore(tmp_path / "ours")
    _merged(store, ours, runs=1)
    assert [run.spec for run in ours.runs()] == [RUN]
    assert not (ours.run(RUN).path / "notes.txt").exists()


def test_merge_takes_kept_checkpoints_along(store, tmp_path):
    averaged, ours = spec("SWA", seed=1), RunStore(tmp_path / "ours")
    train([averaged], store, PLACE, keep_every=4)
    assert not store.run(averaged).lineage.done
    _merged(store, ours, runs=3, measurements=1, kept_checkpoints=4)
    assert list(ours.run(averaged).kept()) == list(store.run(averaged).kept()) == [0, 4, 8, 12]
    assert ours.faults() == []
    _merged(store, ours, here_already=4)
    other = RunStore(tmp_path / "other")
    flip(store.run(averaged).kept()[4], 20_000)
    _merged(store, other, runs=3, measurements=1, refused=[store.run(averaged).kept()[4]])


def test_merge_names_what_it_cannot_take_and_goes_on(store, tmp_path):
    ours, measurement = RunStore(tmp_path / "ours"), store.run(RUN).measurement(PROBE)
    refuses(lambda: merge(RunStore(tmp_path / "none"), ours), f"{tmp_path / 'none'} contains no run")
    with ours.run(RUN).claim():
        (sentence,) = _merged(store, ours, runs=1, refused=[ours.run(RUN).path])
        assert "is in use by another process; merge again" in sentence
    flip(measurement.result, 9_000)
    _merged(store, ours, runs=1, here_already=1, refused=[measurement.result])
    for path in (store.run(RUN).checkpoint("last"), store.run(RUN).path / "spec.json"):
        fresh, whole = RunStore(tmp_path / path.name), path.read_bytes()
        flip(path, 900)
        _merged(store, fresh, runs=1, refused=[path])
        assert not fresh.run(RUN).done
        path.write_bytes(whole)
    (store.run(OTHER).path / "provenance.json").write_text("{}")
    refused = sorted([measurement.result, store.run(OTHER).path / "provenance.json"])  # runs are merged in their order
    _merged(store, RunStore(tmp_path / "last"), runs=1, refused=refused)


def test_nothing_follows_a_symbolic_link(store, tmp_path):
    run, outside, ours = store.run(RUN), tmp_path / "outside", RunStore(tmp_path / "ours")
    run.path.rename(outside)
    run.path.symlink_to(outside)
    _merged(store, ours, runs=1, refused=[run.path])
    before = sorted(outside.rglob("*"))
    for entry in (run, run.measurement(PROBE), run.measurement(PROBE.replace(seed=7))):
        refuses(lambda entry=entry: entry.claim().__enter__(), run.path, "is a symbolic link")
    assert sorted(outside.rglob("*")) == before
    store.remove(run)
    assert not run.path.is_symlink() and (outside / "done").exists()
    outside.rename(run.path)
    (run.path / "checkpoints").rename(outside)
    (run.path / "checkpoints").symlink_to(outside)
    _merged(store, ours, here_already=1, refused=[run.path / "checkpoints"])
    (run.path / "measurements").rename(tmp_path / "measurements")
    (run.path / "measurements").symlink_to(tmp_path / "measurements")
    store.remove(run)
    assert (outside / "last.safetensors").exists()
    assert (tmp_path / "measurements" / PROBE.digest / "done").exists()
    assert [path.name for path in store.root.iterdir()] == [OTHER.digest]


# --- verify, list, remove: damaged stores; leftovers


def test_verify_counts_what_nothing_vouches_for(store, tmp_path):
    run, other = store.run(RUN), store.run(OTHER)
    (other.path / "spec.json").unlink()
    (run.path / "notes.txt").write_text("mine")
    (run.measurement(PROBE).path / "done").write_bytes(b"")
    flip(run.checkpoint("last"), 9_000)
    faults = store.faults()
    for path, words in {
        other.path: "has no spec.json",
        run.path / "notes.txt": "is not listed in `done`",
        run.measurement(PROBE).path / "done": "is damaged",
        run.checkpoint("last"): "is damaged",
    }.items():
        assert len([fault for fault in faults if str(path) in fault and words in fault]) == 1, path
    assert len(faults) == 4
    refuses(RunStore(tmp_path / "nowhere").faults, f"{tmp_path / 'nowhere'} does not exist")


def test_the_flipped_file_is_blamed(store):
    run = store.run(RUN)
    (run.path / "spec.json").write_text("{")
    done = (run.path / "done").read_text()
    digit = done.index('"log.jsonl": "') + 14
    (run.path / "done").write_text(f"{done[:digit]}{'0' if done[digit] != '0' else '1'}{done[digit + 1 :]}")
    assert [name in fault for name, fault in zip(["spec.json", "done"], store.faults(), strict=True)] == [True, True]


@pytest.mark.slow
def test_list_and_rm_go_on_after_damage(store):
    (store.run(RUN).path / "spec.json").write_text("{")
    command = ["runs", "list", "--store", store.root]
    listed = flatlab(*command)
    assert listed.returncode == 1 and "damaged" in listed.stdout and OTHER.digest in listed.stdout
    assert f"{store.run(RUN).path / 'spec.json'} is damaged" in listed.stderr
    removed = flatlab("runs", "rm", RUN.digest[:8], "--store", store.root)
    assert removed.returncode == 0 and not store.run(RUN).path.exists()
    (store.run(OTHER).path / "spec.json").unlink()
    assert flatlab("runs", "rm", OTHER.digest[:8], "--store", store.root).returncode == 0
    assert flatlab(*command).returncode == 0


def flatlab(*words):
    return subprocess.run([sys.executable, "-m", "flatlab", *map(str, words)], capture_output=True, text=True)


def test_clean_removes_what_nobody_holds(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t" / "flatlab-users-own").mkdir(parents=True)
    held = files.scratch()
    living = held.__enter__()
    dead = tmp_path / "t" / "flatlab-x"
    shutil.copytree(living, dead)
    run, unit = store.run(RUN), store.run(RUN).measurement(PROBE)
    (store.root / f".removed-{OTHER.digest}").mkdir()
    killed = run.path / "state" / f".resume.safetensors.{files.HOST}.{'0' * 16}.tmp"
    elsewhere = unit.path / f".unit.safetensors.another-host.{'0' * 16}.tmp"
    for path in (killed, elsewhere):
        path.write_bytes(b"half")
    past = time.time() - 10
    with files.aside(unit.path / "unit") as writing, open(writing, "xb") as file:
        files._hold(file)
        for path in (killed, elsewhere, writing):
            os.utime(path, (past, past))
        removed = leftovers.clean(store)
        assert writing.exists()
    assert set(removed) == {store.root / f".removed-{OTHER.digest}", killed, dead}
    assert elsewhere.exists() and living.exists() and (tmp_path / "t" / "flatlab-users-own").exists()
    held.__exit__(None, None, None)
    assert not living.exists()
    assert leftovers.clean(store) == []
    os.utime(elsewhere, (0, 0))
    assert leftovers.clean(store) == [elsewhere]


def test_a_removal_that_is_killed_is_found_by_clean(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        store.remove(store.run(RUN))
    gone = store.root / f".removed-{RUN.digest}"
    assert gone.exists() and gone in list(leftovers.leftovers(store))
    said = flatlab("runs", "verify", "--store", store.root)
    assert (
        said.returncode == 0 and "leftovers of killed processes; `flatlab runs verify --clean` removes" in said.stdout
    )
    assert flatlab("runs", "verify", "--clean", "--store", store.root).returncode == 0
    assert not gone.exists()


def test_a_claim_removes_nothing(store):
    run = store.run(RUN)
    writing = run.path / "state" / f".resume.safetensors.{files.HOST}.{'0' * 16}.tmp"
    writing.touch()
    os.utime(writing, (0, 0))
    with run.claim() as free, run.measurement(PROBE).claim():
        assert free and writing.exists()


def test_spec_and_done_are_plain_json(store):
    run = store.run(RUN)
    assert json.loads((run.path / "spec.json").read_text()) == RUN.model_dump(mode="json")
    assert set(json.loads((run.path / "done").read_text())["files"]) == set(run.files())
    assert "provenance.json" not in run.files()
