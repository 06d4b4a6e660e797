"""The cache on a tree that the test itself makes: what is decoded, what is kept, kills, races and flipped bits."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import call, documented
from PIL import Image

from flatlab.data import cache, decode
from flatlab.data import load as data_load
from flatlab.data.batches import TrainingStream, evaluation_batches
from flatlab.errors import UserError

SIZE = 8
KINDS = {  # name -> mode, (width, height)
    "photo/cat/a.png": ("RGBA", (12, 9)),
    "photo/cat/b.JPG": ("RGB", (40, 20)),
    "photo/dog/grey.png": ("L", (9, 30)),
    "photo/dog/small.webp": ("RGB", (6, 5)),
    "sketch/cat/lossy.webp": ("RGB", (33, 17)),
    "sketch/dog/palette.gif": ("P", (14, 10)),
    "sketch/dog/turned.jpg": ("RGB", (24, 12)),  # its EXIF says so
}


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "animals"
    for seed, (name, (mode, size)) in enumerate(KINDS.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if "turned" in name else 1
        Image.fromarray(pixels).convert(mode).save(path, **({"exif": exif} if path.suffix == ".jpg" else {}))
    (root / "photo" / "cat" / "notes.txt").write_text("no image")
    return root


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


def prepare(root, kept, **more):
    return cache.prepare("folder:animals", data_dir=root, image_size=SIZE, cache=kept, **more)


def load(root, kept):
    return data_load.load("folder:animals", data_dir=root, image_size=SIZE, cache=kept)


def entries(kept):
    return sorted(path.name for path in kept.iterdir() if not path.name.startswith("."))


def leftovers(kept):
    return [path.name for path in kept.iterdir() if path.name.endswith(".partial")]


# --- what is kept ------------------------------------------------------------------------------------------------


def test_squares_and_originals_are_imagefolders_images(tree, kept):
    data = load(tree, kept)
    assert [domain.labels.tolist() for domain in data.domains] == [[0, 0, 1, 1], [0, 1, 1]]
    names = iter(KINDS)
    for domain in data.domains:
        assert isinstance(domain.images, torch.Tensor) and domain.images.shape[1:] == (3, SIZE, SIZE)
        for row in range(len(domain)):
            name = next(names)
            with Image.open(tree / name) as image:
                rgb = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
            (original,) = domain.originals.pick(torch.tensor([row]))
            share = min(1, 12 / min(rgb.size))  # 12 pixels: 1.4 times 8, rounded up
            assert original.shape == (3, round(rgb.height * share), round(rgb.width * share))
            for mine, size in ((domain.images[row], (SIZE, SIZE)), (original, original.shape[:0:-1])):
                expected = np.asarray(rgb.resize(tuple(size), Image.Resampling.BILINEAR))
                assert np.array_equal(mine.permute(1, 2, 0).numpy(), expected), name


def test_images_are_decoded_once(tree, kept, monkeypatch):
    calls = []
    first = prepare(tree, kept, report=lambda done, of: calls.append((done, of)))
    assert calls == [(done, 7) for done in range(1, 8)] and first.stored
    monkeypatch.setattr(cache, "decode", None)
    again = prepare(tree, kept, report=lambda done, of: calls.append((done, of)))
    assert len(calls) == 7 and again.fingerprint == first.fingerprint
    assert np.array_equal(again.sizes, first.sizes) and entries(kept) == [first.folder.name]


def test_a_write_to_the_images_does_not_reach_the_cache(tree, kept):
    load(tree, kept).domains[0].images.fill_(0)
    assert load(tree, kept).domains[0].images.any()


def test_the_files_bytes_decide_the_fingerprint(tree, kept, tmp_path):
    first = prepare(tree, kept)
    os.utime(tree / "photo/cat/a.png")
    touched = prepare(tree, kept)
    assert touched.fingerprint == first.fingerprint and touched.folder != first.folder
    tree = tree.rename(tmp_path / "elsewhere")
    assert prepare(tree, kept).folder == touched.folder
    whole = data_load.load("folder:animals", data_dir=tree, image_size=2 * SIZE, cache=kept)
    assert whole.fingerprint == first.fingerprint  # another size of the same files
    (tree / "photo/cat/b.JPG").rename(tree / "photo/cat/0.jpg")  # now the first of its class: another split
    assert prepare(tree, kept).fingerprint != first.fingerprint
    (tree / "photo/cat/0.jpg").rename(tree / "photo/cat/b.JPG")
    assert prepare(tree, kept).fingerprint == first.fingerprint
    (tree / "photo/dog/grey.png").rename(tree / "photo/cat/z.png")  # the same order, another label
    assert prepare(tree, kept).fingerprint != first.fingerprint


@pytest.mark.parametrize(("name", "said"), [("cut.jpg", "cannot be read as"), ("cut.png", ""), ("cut.webp", "")])
def test_a_truncated_image_is_named_and_nothing_is_left(tree, kept, name, said):
    path = tree / "sketch" / "cat" / name
    pixels = np.random.RandomState(9).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"sketch/cat/{name} .*{said}.*replace or remove it"):
        prepare(tree, kept)
    assert entries(kept) == leftovers(kept) == []
    path.unlink()
    assert prepare(tree, kept).stored


def test_a_file_of_no_bytes_is_named(tree, kept):
    (tree / "photo" / "dog" / "empty.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"photo/dog/empty\.jpg is empty or not an image"):
        prepare(tree, kept)


def test_the_folder_is_the_users_or_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("FLATLAB_CACHE", str(tmp_path))
    assert cache.default_folder() == tmp_path
    monkeypatch.delenv("FLATLAB_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache.default_folder() == Path("/elsewhere/flatlab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_folder() == Path.home() / ".cache" / "flatlab"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache.default_folder() == Path.home() / "Library" / "Caches" / "flatlab"


# --- damage, kills and races -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [cache.SQUARES, cache.ORIGINALS, "index.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_damage_is_seen_on_opening(tree, kept, name, harm):
    path = prepare(tree, kept).folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if harm == "remove" else path.write_bytes(content if harm == "flip" else content[:-1])
    with pytest.raises(UserError, match="is damaged: its content does not match its hash. Delete it"):
        prepare(tree, kept)


def build(root, kept, last=None, wait=0.0):
    """Build in a child, slowly; die at the `last` image."""

    def report(done, of):
        time.sleep(wait)
        (kept / f"{os.getpid()}.seen").write_text(str(done))
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(root, kept, report=report)


def child(*args):
    process = multiprocessing.get_context("forkserver").Process(target=build, args=args)
    process.start()
    return process


@pytest.mark.parametrize("last", [1, 7])
def test_a_builder_that_is_killed_leaves_no_entry_and_its_successor_goes_on(tree, kept, last):
    process = child(tree, kept, last)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert entries(kept) == [f"{process.pid}.seen"] and len(leftovers(kept)) == 1
    assert prepare(tree, kept).stored and leftovers(kept) == []
    assert load(tree, kept).fingerprint == load(tree, kept.with_name("another")).fingerprint


def test_two_builders_at_once_build_it_once(tree, kept):
    both = [child(tree, kept, None, 0.05) for _ in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(kept.glob("*.seen"))) == 1  # the other one waited, and found it
    assert prepare(tree, kept).stored and leftovers(kept) == []


# --- too many to store -------------------------------------------------------------------------------------------


def test_what_is_decoded_each_time_gives_the_same_batches(tree, kept, monkeypatch):
    stored = load(tree, kept)
    monkeypatch.setattr(cache, "LIMIT", 100)
    lazy = load(tree, kept.with_name("lazy"))
    assert lazy.fingerprint == stored.fingerprint and not prepare(tree, kept.with_name("lazy")).stored
    assert sum(file.stat().st_size for file in kept.with_name("lazy").rglob("*.bin")) == 0
    rows = {domain.name: np.arange(len(domain)) for domain in stored.domains}
    cpu = torch.device("cpu")
    for augmented in (True, False):
        streams = [
            TrainingStream(data, rows, batch_size=6, seed=3, device=cpu, augmented=augmented) for data in (stored, lazy)
        ]
        for step in (0, 1, 2, 7, 1):  # in order, and not
            first, second = (each.batch(step) for each in streams)
            assert torch.equal(first.inputs, second.inputs) and torch.equal(first.targets, second.targets)
    for kept_bytes in (2**28, 0):  # made once, and made each time
        monkeypatch.setattr("flatlab.data.batches.KEPT", kept_bytes)
        first, second = (
            evaluation_batches(data, "photo", rows["photo"], device=cpu, batch_size=3) for data in (stored, lazy)
        )
        for _ in range(2):
            for (x, y), (u, v) in zip(first, second, strict=True):
                assert torch.equal(x, u) and torch.equal(y, v) and x.dtype == torch.float32


def test_a_mistake_in_a_thread_is_raised_in_the_training(tree, kept, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 0)
    data = load(tree, kept)
    (tree / "photo" / "cat" / "a.png").write_bytes(b"")
    stream = TrainingStream(data, {"photo": np.array([0])}, batch_size=1, seed=0, device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"photo/cat/a\.png is empty"):
        stream.batch(0)


def test_threads_keep_the_order_and_do_not_run_far_ahead(tmp_path):
    started = []
    results = decode.in_order(lambda path: started.append(path) or path, [Path(str(k)) for k in range(1000)])
    assert next(results) == Path("0")
    time.sleep(0.05)
    assert len(started) <= decode.AHEAD * decode.THREADS + 1
    assert list(results) == [Path(str(k)) for k in range(1, 1000)]


# --- what is evicted ---------------------------------------------------------------------------------------------


def test_entries_used_longest_ago_are_evicted_above_a_size(tree, kept):
    made = [cache.prepare("folder:animals", data_dir=tree, image_size=size, cache=kept).folder for size in (6, 7, 8)]
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in made]
    now = time.time()
    for folder, days in zip(made, (3, 2, 0.5), strict=True):
        os.utime(folder, (now - days * 86400, now - days * 86400))
    assert cache.evict(kept, sum(sizes)) == []
    assert cache.prepare("folder:animals", data_dir=tree, image_size=6, cache=kept).folder == made[0]  # it is used now
    assert cache.evict(kept, sum(sizes) - 1) == [made[1]]
    assert cache.evict(kept, 0) == []  # the others were used within a day
    assert entries(kept) == sorted([made[0].name, made[2].name]) and leftovers(kept) == []
    assert prepare(tree, kept).folder == made[2]


def test_the_size_that_stays_is_a_number_with_a_unit(tree, kept, capsys):
    folder = prepare(tree, kept).folder
    os.utime(folder, (0, 0))
    assert call("data", "cache", "--keep", "20", "--cache", kept) == 2
    assert "--keep must be a number with MB, GB or TB, such as 20GB, got 20." in capsys.readouterr().err
    assert call("data", "cache", "--keep", "0.5 gb", "--cache", kept) == 0
    assert "0 entries removed." in capsys.readouterr().out
    assert call("data", "cache", "--keep", "0MB", "--cache", kept, "--json") == 0
    assert documented("data cache", capsys.readouterr().out)["removed"] and entries(kept) == []
