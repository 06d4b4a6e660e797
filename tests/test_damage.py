"""Damage is named and never used: files, checkpoints, logs, states, blocks, and `done` itself."""

import errno
import os
from functools import partial

import numpy as np
import pytest
from stores import GROUP, PLACE, PROBE, content, copied, flip, refuses, spec, trained

from flatlab import files, seeds
from flatlab.errors import UserError
from flatlab.measure.runner import measure
from flatlab.store.merging import merge
from flatlab.store.runs import Measurement, Run, RunStore
from flatlab.train.loop import train

RUN, OTHER = GROUP[0], GROUP[3]
UNIT = f"unit-0-{seeds.derive(1.0):016x}_8-16.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two runs, one of them measured."""
    store = trained(tmp_path_factory.mktemp("made"), RUN, OTHER)
    measure(store.run(RUN), PROBE, PLACE)
    return store


@pytest.fixture
def store(made, tmp_path):
    return copied(made, tmp_path / "store")


# --- files


def test_arrays_come_back_as_they_were(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": np.array(3.5), "none": np.zeros((0, 2))}
    files.save_arrays(tmp_path / "x", arrays, {"loss": [0.1, float("inf")]})
    back, meta = files.load_arrays(tmp_path / "x")
    assert meta == {"loss": [0.1, float("inf")]}
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.slow
def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    files.save_arrays(path, {"a": np.arange(3, dtype=np.float32), "b": np.array(1)}, {"step": 3})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flip(path, bit)
        refuses(partial(files.load_arrays, path), path, "is damaged")
        path.write_bytes(whole)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refuses(partial(files.load_arrays, path), path, "is damaged")
    path.unlink()
    refuses(partial(files.load_arrays, path), path, "is missing")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", _full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- damage

DAMAGE = {
    "checkpoint": "checkpoints/last.safetensors",
    "selected": "checkpoints/selected.safetensors",
    "log": "log.jsonl",
    "spec": "spec.json",
    "unit": f"measurements/{PROBE.digest}/{UNIT}",
    "result": f"measurements/{PROBE.digest}/result.safetensors",
    "probe's spec": f"measurements/{PROBE.digest}/spec.json",
}


@pytest.mark.parametrize("name", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("how", ["header", "body", "truncated", "removed"])
def test_damage_is_named(store, name, how):
    path = store.run(RUN).path / name
    assert store.faults() == []
    match how:
        case "header":
            flip(path, 100)
        case "body":
            flip(path, 8 * path.stat().st_size - 20)
        case "truncated":
            path.write_bytes(path.read_bytes()[:-3])
        case "removed" if path.name != "spec.json":
            path.unlink()
        case _:
            return  # a folder without a spec is no entry
    (fault,) = store.faults()
    assert str(path) in fault
    assert ("is missing" if how == "removed" else "is damaged") in fault
    if path.suffix == ".safetensors":
        refuses(partial(files.load_arrays, path), path)
    elif path.name == "log.jsonl":
        refuses(store.run(RUN).rows, path, "is damaged")
    else:
        refuses(lambda: [run.measurements() for run in store.runs()], path, "is damaged")


def _readers(store):
    """What is read of each file of the run and its measurement, by the file's path."""
    run = store.run(RUN)
    measurement = run.measurement(PROBE)
    return {
        run.path / "spec.json": lambda: Run.read(run.path).spec,
        run.path / "done": run.hashes,
        run.path / "provenance.json": lambda: run.provenance,
        run.path / "log.jsonl": run.rows,
        run.checkpoint("last"): lambda: _plain(files.load_arrays(run.checkpoint("last"))),
        run.checkpoint("selected"): lambda: _plain(files.load_arrays(run.checkpoint("selected"))),
        measurement.path / "spec.json": lambda: Measurement.read(measurement.path).spec,
        measurement.path / "done": measurement.hashes,
        measurement.path / "provenance.json": lambda: measurement.provenance,
        measurement.path / UNIT: lambda: _plain(files.load_arrays(measurement.path / UNIT)),
        measurement.result: lambda: _plain(run.result(PROBE).to_arrays()),
    }


def _plain(loaded):
    arrays, facts = loaded
    return {name: (array.dtype, array.tolist()) for name, array in arrays.items()}, facts


def test_a_flipped_byte_anywhere_is_right_or_one_sentence(store):
    """Some forty bytes of each kind of file, the head most densely: a read is what it was, or is refused by name."""
    for path, read in _readers(store).items():
        right, whole = read(), path.read_bytes()
        head = min(len(whole), 400)
        places = [*range(0, head, 16), *range(head, len(whole), max(1, (len(whole) - head) // 16))]
        for place in places:
            for mask in (0x01, 0x20, 0xFF):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
                try:
                    assert read() == right, (path, place, mask)
                except UserError as error:
                    assert str(path) in str(error) and "\n" not in str(error), (path, place, mask)
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            try:
                assert read() == right, (path, length)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error), (path, length)
        path.write_bytes(whole)
    assert store.faults() == []


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"files": 3}'])
def test_a_damaged_done_is_named(store, garbage):
    path = store.run(RUN).path / "done"
    path.write_bytes(garbage)
    (fault,) = store.faults()
    assert str(path) in fault
    assert len(store.runs()) == 2
    refuses(store.run(RUN).rows, path, "is damaged")
    counts, (sentence,) = merge(store, RunStore(store.root.parent / "empty"))
    assert counts["runs"] == 1 and str(path) in sentence and "is damaged" in sentence


def test_a_spec_of_another_run_is_named(store):
    path = store.run(RUN).path / "spec.json"
    (path.parent / "done").unlink()
    path.write_text(RUN.replace(seed=1).canonical())
    refuses(store.runs, path, "is damaged", "it is not the spec of")
    assert any(str(path) in fault for fault in store.faults())


def test_a_damaged_provenance_is_named(store):
    path = store.run(RUN).path / "provenance.json"
    path.write_bytes(b"{")
    refuses(lambda: store.run(RUN).provenance, path, "is damaged")
    assert str(path) in " ".join(store.faults())


def test_a_run_with_a_damaged_checkpoint_is_neither_measured_nor_retrained(store):
    run, measurement = store.run(RUN), PROBE.replace(seed=1)
    flip(run.checkpoint("selected"), 20_000)
    before = run.checkpoint("selected").read_bytes()
    refuses(lambda: measure(run, measurement, PLACE), run.checkpoint("selected"), "is damaged", "Delete it")
    train([RUN], store, PLACE)
    assert run.checkpoint("selected").read_bytes() == before
    assert not run.measurement(measurement).done


def test_what_the_sentence_says_mends_it(made, store):
    run = store.run(RUN)
    flip(run.checkpoint("selected"), 20_000)
    run.checkpoint("selected").unlink()
    (run.path / "done").unlink()
    train([RUN], store, PLACE)
    assert content(run) == content(made.run(RUN))


def test_a_damaged_unit_is_not_used(made, store):
    measurement = store.run(RUN).measurement(PROBE)
    (measurement.path / "done").unlink()
    unit = measurement.path / UNIT
    flip(unit, 8 * unit.stat().st_size - 20)
    assert [str(unit) in fault for fault in store.faults()] == [True]
    refuses(lambda: measure(store.run(RUN), PROBE, PLACE), unit, "is damaged")
    unit.unlink()
    measure(store.run(RUN), PROBE, PLACE)
    assert content(measurement) == content(made.run(RUN).measurement(PROBE))


@pytest.mark.parametrize("name", ["resume", "fork-6"])
def test_a_damaged_state_is_not_used(tmp_path, name):
    child = spec("QT-DoG")
    store = trained(tmp_path, child.parent, forks={6})
    fork = store.run(child.parent).state("fork-6")
    holder = store.run(child.parent if name == "fork-6" else child)
    holder.create()
    if name == "resume":
        files.save_arrays(holder.state("resume"), *files.load_arrays(fork))
    assert store.faults() == []
    flip(holder.state(name), 200_000)
    (fault,) = store.faults()
    assert str(holder.state(name)) in fault
    refuses(lambda: train([child], store, PLACE), holder.state(name), "is damaged", "Delete it")
    assert not store.run(child).done
    holder.state(name).unlink()
    train([child], store, PLACE)
    assert store.run(child).done
