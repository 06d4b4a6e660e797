"""Finished runs are held against the data at hand before they are believed: folders of one name, and changed images."""

import os

import numpy as np
import pytest
from PIL import Image
from stores import PLACE, PROBE, refuses, spec, trained

from flatlab import reproduce
from flatlab.data import cache, decode, fingerprints
from flatlab.measure.runner import measure
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore, check_data
from flatlab.train.derived import derive, join
from flatlab.train.loop import train

RUN = spec(steps=2, eval_every=2, dataset="folder:pics", held_out="b", batch_size=4)
SHORT = PROBE.replace(num_samples=2, images=4)
DIFFER = ("The data of folder:pics differ from those that run", "give the same data, or another --store")


def _pictures(root, seed):
    rng = np.random.default_rng(seed)
    for name in ("a/top", "a/bottom", "b/top", "b/bottom"):
        (root / "pics" / name).mkdir(parents=True)
        for index in range(6):
            pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "pics" / name / f"{index}.bmp")
    return PLACE.replace(data_dir=str(root / "pics"), cache=str(root.parent / "cache"))


@pytest.fixture
def places(tmp_path):
    """Two folders of one name with other images."""
    return [_pictures(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture
def store(tmp_path, places):
    store = RunStore(tmp_path / "runs")
    train([RUN], store, places[0])
    measure(store.run(RUN), SHORT, places[0])
    return store


def _believers(store, place):
    run = store.run(RUN)
    return [
        lambda: train([RUN], store, place),
        lambda: measure(run, SHORT, place),
        lambda: measure(run, SHORT.replace(seed=1), place),
        lambda: check_data([run], place),
    ]


def test_folders_of_one_name_are_distinguished(store, places):
    for act in _believers(store, places[0]):
        act()
    for act in _believers(store, places[1]):
        refuses(act, *DIFFER, RUN.digest)
    other = RunStore(store.root.with_name("others"))
    train([RUN], other, places[1])
    assert other.run(RUN).rows() != store.run(RUN).rows()


def test_images_changed_in_place_are_seen(store, places):
    path = next(cache.Path(places[0].data_dir).rglob("*.bmp"))
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    for act in _believers(store, places[0]):
        refuses(act, *DIFFER, RUN.digest)
    content[-1] ^= 1
    path.write_bytes(content)
    for act in _believers(store, places[0]):
        act()


def test_files_are_read_once(store, places, monkeypatch):
    read = []
    digest = decode.file_digest
    monkeypatch.setattr(cache, "file_digest", lambda path: read.append(path) or digest(path))
    for _ in range(3):
        assert len(fingerprints.at_hand("folder:pics", places[1].data_dir, places[1].cache)) == 64
    assert len(read) == 24
    check_data([store.run(RUN)], places[0])
    assert len(read) == 24  # known since the run was trained


def test_data_that_are_not_here_are_not_compared(store, places):
    for gone in (None, str(store.root / "nowhere")):
        check_data([store.run(RUN)], places[0].replace(data_dir=gone))
    check_data([store.run(RUN.replace(seed=1))], places[1])


def test_the_embedded_digits_too(tmp_path):
    whole, rounded = spec(steps=2, eval_every=2), spec("RTN", steps=2, eval_every=2)
    store = trained(tmp_path / "runs", whole)
    train([rounded], store, PLACE)
    both = whole.replace(members=(whole, whole.replace(seed=1)))
    for each in (whole, rounded, both):
        store.run(each).create()
        store.run(each).note(data_fingerprint="0" * 64)
    words = "The data of digits differ from those that run"
    refuses(lambda: train([whole], store, PLACE), words, whole.digest)
    refuses(lambda: measure(store.run(whole), PROBE, PLACE), words, whole.digest)
    refuses(lambda: derive(rounded, store, PLACE), words, rounded.digest)
    refuses(lambda: join(both, store, PLACE), words, both.digest)


def test_reproduce_and_list_compare_too(tmp_path):
    figure, store = reproduce.analysis("fig3"), RunStore(tmp_path / "runs")
    first = figure.plan(SMOKE)[0][0]
    run = store.run(first)
    run.create()
    run.write_log([])
    run.note(data_fingerprint=fingerprints.at_hand("digits", None, None))
    run.finish()
    todo = reproduce.missing(figure, SMOKE, store, PLACE)
    assert first not in [each for job in todo if not job.measurements for each in job.runs]
    run.note(data_fingerprint="0" * 64)
    refuses(lambda: reproduce.missing(figure, SMOKE, store, PLACE), "The data of digits differ", first.digest)
    refuses(lambda: reproduce.missing_of([figure], SMOKE, store, PLACE), "The data of digits differ", first.digest)
