import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from flatlab.data import catalog, digits, folders
from flatlab.data import load as data_load
from flatlab.data.batches import TrainingStream, evaluation_batches
from flatlab.data.domains import Domain, DomainSet, split
from flatlab.errors import UserError
from flatlab.seeds import seed_hash

CPU = torch.device("cpu")
PACS = Path(__file__).parents[2] / "shared" / "data" / "PACS"
needs_pacs = pytest.mark.skipif(not PACS.is_dir(), reason=f"the PACS data set is not at {PACS}")


@pytest.fixture(scope="module")
def embedded() -> DomainSet:
    return digits.load()


def tagged() -> DomainSet:
    """Two domains whose images carry their own row number, and 100 more in the second one."""

    def domain(name: str, offset: int) -> Domain:
        images = (torch.arange(50, dtype=torch.uint8) + offset).view(50, 1, 1, 1).expand(50, 1, 2, 2)
        return Domain(name, images.contiguous(), torch.arange(50) % 5)

    return DomainSet("tagged", (domain("first", 0), domain("second", 100)), tuple("abcde"), mean=(0.0,), std=(1 / 255,))


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (12, 9), seed: int = 0) -> Path:
    """Write a noisy image, in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two domains of two classes: JPEG, PNG and WebP, grey, palette and RGBA, and files that are no images."""
    root = tmp_path / "animals"
    picture(root / "photo" / "cat" / "b.JPG")
    picture(root / "photo" / "cat" / "a.png", "RGBA")
    picture(root / "photo" / "dog" / "grey.png", "L")
    picture(root / "sketch" / "cat" / "lossy.webp")
    picture(root / "sketch" / "dog" / "palette.gif", "P")
    for stray in (
        "notes.txt",
        "photo/notes.txt",
        "photo/cat/labels.txt",
        "photo/dog/.DS_Store",
        "photo/dog/._grey.png",
    ):
        (root / stray).write_text("no image")
    (root / ".git" / "objects").mkdir(parents=True)
    return root


def load(root: Path, size: int = 8) -> DomainSet:
    return data_load.load("folder:animals", data_dir=root, image_size=size)


# --- the catalog -----------------------------------------------------------------------------------------------------


def test_catalog_sums_to_the_totals_that_domainbed_prints() -> None:
    totals = {"digits": 1797, "PACS": 9991, "VLCS": 10729, "OfficeHome": 15588, "DomainNet": 586575}
    assert {name: sum(catalog.CATALOG[name].domains.values()) for name in totals} == totals


def test_catalog_is_in_the_order_of_sorted_folders() -> None:
    for facts in catalog.CATALOG.values():
        assert list(facts.domains) == sorted(facts.domains)
        assert isinstance(facts.classes, int) or list(facts.classes) == sorted(facts.classes)


def test_catalog_needs_no_torch() -> None:
    line = "import sys; sys.modules['torch'] = None; import flatlab.data.catalog as c; c.held_out('pacs', None, '2')"
    subprocess.run([sys.executable, "-c", line], check=True)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("pacs", "PACS"), ("Digits", "digits"), ("officehome", "OfficeHome"), ("Folder: my set", "folder:my set")],
)
def test_canonical_is_blind_to_case(written: str, meant: str) -> None:
    assert catalog.canonical(written) == meant


@pytest.mark.parametrize("unknown", ["PASC", "folder:", "file:animals"])
def test_unknown_data_set_is_refused_with_the_known_ones(unknown: str) -> None:
    with pytest.raises(UserError, match=r"Unknown dataset .*nown: digits, PACS, .*folder:NAME"):
        catalog.canonical(unknown)


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("sketch", ("sketch",)),
        ("Art-Painting", ("art_painting",)),
        ("2", ("photo",)),
        ("sketch, 1,sketch", ("sketch", "cartoon")),
        ("all", ("art_painting", "cartoon", "photo", "sketch")),
    ],
)
def test_held_out_by_name_by_index_or_all(which: str, names: tuple[str, ...]) -> None:
    assert catalog.held_out("PACS", None, which) == names


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        ("4", "PACS has no domain 4; its domains are 0 art_painting, 1 cartoon, 2 photo, 3 sketch"),
        ("skech", "Unknown held-out domain 'skech'; did you mean sketch?"),
        ("-1", "Unknown held-out domain '-1'"),
    ],
)
def test_held_out_refuses_what_is_not_there(which: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        catalog.held_out("PACS", None, which)


def test_held_out_of_a_folder_reads_its_domains(tree: Path) -> None:
    assert catalog.held_out("folder:animals", tree, "all") == ("photo", "sketch")
    assert catalog.held_out("folder:animals", tree, "1") == ("sketch",)


def test_a_domain_named_by_digits_goes_before_an_index(tmp_path: Path) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / name / "dog").mkdir(parents=True)
    assert catalog.held_out("folder:years", tmp_path, "1") == ("1",)
    assert catalog.held_out("folder:years", tmp_path, "0") == ("1",)


def test_locate_takes_the_folder_or_its_parent(tmp_path: Path) -> None:
    for domain in catalog.CATALOG["OfficeHome"].domains:
        (tmp_path / "office_home" / domain).mkdir(parents=True)
    assert catalog.locate("OfficeHome", tmp_path) == tmp_path / "office_home"
    assert catalog.locate("OfficeHome", tmp_path / "office_home") == tmp_path / "office_home"


@pytest.mark.parametrize(
    ("dataset", "folder", "sentence"),
    [
        ("PACS", None, "PACS is read from disk; pass --data-dir, a folder with art_painting, cartoon, photo, sketch"),
        ("PACS", "nowhere", "PACS is not in .*nowhere or .*PACS: expected a folder with art_painting, .*--data-dir"),
        ("folder:animals", None, "folder:animals is read from disk; pass --data-dir"),
        ("folder:animals", "nowhere", "folder:animals is not in .*nowhere: expected a folder with one folder per dom"),
        ("digits", "nowhere", "digits is embedded in flatlab and has no folder"),
    ],
)
def test_locate_says_what_it_expected(tmp_path: Path, dataset: str, folder: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        catalog.locate(dataset, tmp_path / folder if folder else None)


# --- the split -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trial_seed", "index", "golden"), [(0, 0, 894182419), (0, 1, 1514274641), (2, 3, 1709828778)])
def test_seed_hash_is_domainbeds(trial_seed: int, index: int, golden: int) -> None:
    printed = f"({trial_seed}, {index})".encode()
    assert seed_hash(trial_seed, index) == golden == int(hashlib.md5(printed).hexdigest(), 16) % 2**31


def test_split_is_domainbeds_bit_for_bit() -> None:
    shuffled = [5, 0, 3, 7, 8, 6, 1, 2, 9, 4]  # range(10) shuffled by RandomState(seed_hash(0, 1))
    inside, outside, _ = split(10, 1, trial_seed=0, fraction=0.3)
    assert (outside.tolist(), inside.tolist()) == (shuffled[:3], shuffled[3:])
    assert inside.dtype == outside.dtype == np.int64


def test_split_sizes_of_pacs() -> None:
    counts = catalog.CATALOG["PACS"].domains.values()
    sizes = [len(split(n, index, trial_seed=0).out) for index, n in enumerate(counts)]
    assert sizes == [409, 468, 334, 785]


@pytest.mark.parametrize("tested", [0.0, 0.2])
@pytest.mark.parametrize("n", [5, 449, 450])
def test_split_is_disjoint_and_complete(n: int, tested: float) -> None:
    parts = split(n, 0, trial_seed=1, test=tested)
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert len(parts.test) == (0 if not tested else int(0.4 * n) - int(0.4 * n) // 2)


def test_the_test_part_is_cut_off_the_outer_one_as_swad_does() -> None:
    whole = split(450, 2, trial_seed=1, fraction=0.4)
    cut = split(450, 2, trial_seed=1, fraction=0.2, test=0.2)
    again = list(range(180))
    np.random.RandomState(seed_hash(1, 2)).shuffle(again)
    assert np.array_equal(cut.in_, whole.in_)
    assert np.array_equal([*cut.out, *cut.test], whole.out[again]) and len(cut.out) == 90


def test_a_test_part_of_none_is_refused() -> None:
    with pytest.raises(UserError, match="0 to validate on, 1 to test on and 9 to train on; each part needs"):
        split(10, 0, trial_seed=0, fraction=0.1, test=0.01)


def test_split_depends_on_the_trial_and_on_the_domain() -> None:
    first = split(450, 0, trial_seed=0).out
    assert np.array_equal(first, split(450, 0, trial_seed=0).out)
    assert not np.array_equal(first, split(450, 0, trial_seed=1).out)
    assert not np.array_equal(first, split(450, 1, trial_seed=0).out)


@pytest.mark.parametrize(("n", "fraction"), [(4, 0.2), (10, 1.0), (10, -0.2)])
def test_split_refuses_an_empty_part(n: int, fraction: float) -> None:
    with pytest.raises(UserError, match=f"has {n} images: .*both parts need at least one image"):
        split(n, 0, trial_seed=0, fraction=fraction)


# --- domains ---------------------------------------------------------------------------------------------------------


def test_domains_are_found_by_name(embedded: DomainSet) -> None:
    assert embedded.index("ROT30") == 2
    assert embedded.domain("rot30") is embedded.domains[2]
    with pytest.raises(UserError, match="Unknown domain 'rot60'.*: rot0, rot15, rot30, rot45"):
        embedded.domain("rot60")


def test_fingerprint_sees_every_pixel_label_and_name() -> None:
    data = tagged()
    first, second = data.domains
    pixel, label = first.images.clone(), second.labels.clone()
    pixel[-1, 0, 1, 1] += 1
    label[-1] = 0
    changed = [
        replace(data, domains=(replace(first, images=pixel), second)),
        replace(data, domains=(first, replace(second, labels=label))),
        replace(data, domains=(first, replace(second, name="third"))),
        replace(data, domains=(second, first)),
        replace(data, classes=tuple("edcba")),
    ]
    assert tagged().fingerprint == data.fingerprint
    assert len({data.fingerprint, *(each.fingerprint for each in changed)}) == 6


def test_normalise_is_the_usual_formula_and_leaves_its_input_alone() -> None:
    data = replace(tagged(), mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    images = torch.randint(0, 256, (4, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    for given in (images.to(torch.uint8), images.float().contiguous(memory_format=torch.channels_last)):
        before = given.clone()
        inputs = data.normalise(given)
        expected = (images / 255 - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
        torch.testing.assert_close(inputs, expected)
        assert inputs.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(given, before)


# --- the embedded digits ---------------------------------------------------------------------------------------------


def test_digits_have_the_catalogs_domains_and_classes(embedded: DomainSet) -> None:
    facts = catalog.CATALOG["digits"]
    assert {domain.name: len(domain) for domain in embedded.domains} == facts.domains
    assert embedded.classes == facts.classes
    for domain in embedded.domains:
        assert (domain.images.dtype, domain.images.shape[1:]) == (torch.uint8, (1, 16, 16))
        assert (domain.labels.dtype, domain.labels.shape) == (torch.int64, domain.images.shape[:1])


def test_each_class_is_dealt_evenly(embedded: DomainSet) -> None:
    counts = torch.stack([domain.labels.bincount(minlength=10) for domain in embedded.domains])
    assert counts.sum() == 1797
    assert (counts.amax(0) - counts.amin(0)).max() <= 1


def test_each_digit_lies_in_one_domain() -> None:
    labels = np.arange(1797) % 10
    parts = digits._parts(labels, 4)
    assert sorted(np.concatenate(parts)) == list(range(1797))


def test_digits_are_turned_counter_clockwise() -> None:
    stroke = np.zeros((1, 8, 8))
    stroke[0, :4, 3:5] = 16  # from the centre upwards
    rows, columns = np.mgrid[:16, :16] - 7.5
    for angle in digits.ANGLES.values():
        ink = digits._render(stroke, angle)[0, 0].double().numpy()
        up, left = -(ink * rows).sum(), -(ink * columns).sum()
        assert np.rad2deg(np.arctan2(left, up)) == pytest.approx(angle, abs=2)


def test_digits_are_the_same_at_each_load_and_span_the_levels(embedded: DomainSet) -> None:
    assert digits.load().fingerprint == embedded.fingerprint
    pixels = torch.cat([domain.images for domain in embedded.domains])
    assert (pixels.amin(), pixels.amax()) == (0, 255)
    inputs = embedded.normalise(pixels)
    assert inputs.mean().abs() < 0.01
    assert inputs.std() == pytest.approx(1, abs=0.01)


def test_digits_of_another_size_are_refused(embedded: DomainSet) -> None:
    assert data_load.load("Digits", image_size=16).fingerprint == embedded.fingerprint
    with pytest.raises(UserError, match="digits are 16 x 16 pixels; leave --image-size 32 out"):
        data_load.load("digits", image_size=32)


# --- folders of images -----------------------------------------------------------------------------------------------


def test_folder_is_read_in_imagefolders_order(tree: Path) -> None:
    data = load(tree)
    assert (data.name, data.names, data.classes) == ("folder:animals", ("photo", "sketch"), ("cat", "dog"))
    assert [domain.labels.tolist() for domain in data.domains] == [[0, 0, 1], [0, 1]]
    assert (data.domain("photo").images.dtype, data.domain("photo").images.shape) == (torch.uint8, (3, 3, 8, 8))
    with Image.open(tree / "photo" / "cat" / "a.png") as image:  # before b.JPG
        first = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(data.domain("photo").images[0].permute(1, 2, 0).numpy(), first)
    assert load(tree).fingerprint == data.fingerprint


def test_subfolders_and_their_order_are_imagefolders(tmp_path: Path) -> None:
    for name in ("b.png", "deep/a.pgm", "deep/er/c.ppm", "deeper/a.png", ".hidden/d.png"):
        picture(tmp_path / "animals" / "photo" / "cat" / name, "L" if name.endswith("pgm") else "RGB")
        picture(tmp_path / "animals" / "sketch" / "cat" / name, "L" if name.endswith("pgm") else "RGB")
    theirs = [Path(path) for path, _ in ImageFolder(tmp_path / "animals" / "photo").samples]
    assert folders.listing("folder:animals", tmp_path / "animals").paths("photo") == theirs and len(theirs) == 5
    assert catalog.sizes("folder:animals", tmp_path / "animals") == {"photo": 5, "sketch": 5}


def test_grey_palette_and_transparent_images_become_rgb(tree: Path) -> None:
    grey = load(tree).domain("photo").images[2]
    assert torch.equal(grey[0], grey[1])
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    palette = Image.fromarray(pixels, mode="L").convert("P")
    palette.putpalette(np.random.RandomState(0).randint(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(tree / "sketch" / "dog" / "see-through.png", transparency=bytes(range(64)))
    colours = np.asarray(palette.convert("RGB"))
    assert np.array_equal(load(tree).domain("sketch").images[2].permute(1, 2, 0).numpy(), colours)


def test_exif_orientation_is_not_applied(tree: Path) -> None:
    path = picture(tree / "photo" / "cat" / "c.png", size=(8, 8))
    upright = load(tree).domain("photo").images[2]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)
    assert torch.equal(load(tree).domain("photo").images[2], upright)


def test_report_counts_every_image(tree: Path) -> None:
    calls: list[tuple[int, int]] = []
    data_load.load(
        "folder:animals", data_dir=tree, image_size=4, report=lambda done, total: calls.append((done, total))
    )
    assert calls == [(done, 5) for done in range(1, 6)]


def test_default_size_is_imagenets(tree: Path) -> None:
    data = data_load.load("folder:animals", data_dir=tree)
    assert data.domains[0].images.shape == (3, 3, 224, 224)
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "cut.webp"])
def test_a_truncated_image_is_named(tree: Path, name: str) -> None:
    path = picture(tree / "sketch" / "cat" / name, size=(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"sketch/cat/{name} (cannot be read as|is empty or not) an image.*; replace"):
        load(tree)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_what_is_not_an_image_is_named(tree: Path, content: bytes) -> None:
    (tree / "photo" / "dog" / "bad.jpg").write_bytes(content)
    with pytest.raises(
        UserError, match=r"photo/dog/bad\.jpg is empty or not an image of a known format .*; replace or remove it"
    ):
        load(tree)


def test_a_class_missing_in_one_domain_is_named(tree: Path) -> None:
    (tree / "sketch" / "dog" / "palette.gif").unlink()
    with pytest.raises(UserError, match="Class 'dog' has no images in domain 'sketch' of folder:animals; every domain"):
        load(tree)
    (tree / "sketch" / "dog").rmdir()
    with pytest.raises(UserError, match="Class 'dog' has no images in domain 'sketch'"):
        load(tree)


def test_one_domain_or_none_is_refused(tree: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs at least two domains, and .* holds none; expected .*DOMAIN/CLASS/IMAGE"
    ):
        load(tree / "photo")
    with pytest.raises(UserError, match="needs at least two domains, and .* holds only animals"):
        load(tree.parent)


def test_wrong_classes_of_a_known_data_set_are_named(tmp_path: Path) -> None:
    for domain in catalog.CATALOG["VLCS"].domains:
        for name in ("bird", "car", "chair", "dog", "persons"):
            picture(tmp_path / domain / name / "1.png")
    with pytest.raises(UserError, match=r"VLCS has the wrong classes: expected bird, .*person; found 5: .*persons"):
        data_load.load("VLCS", data_dir=tmp_path, image_size=4)


def test_sizes_that_do_not_suit_are_refused(tree: Path) -> None:
    with pytest.raises(UserError, match="image_size must be an integer >= 1, got 0"):
        load(tree, size=0)


def test_check_decodes_every_image_and_names_what_it_cannot(tree: Path) -> None:
    folders_ = tree / "photo" / "dog"
    (folders_ / "bad.jpg").write_bytes(b"")
    (folders_ / "notes.png").write_text("not an image at all")
    cut = picture(folders_ / "cut.jpg", size=(64, 64))
    cut.write_bytes(cut.read_bytes()[:-200])
    seen: list[tuple[int, int]] = []
    photo, sketch = folders.check("folder:animals", tree, report=lambda done, of: seen.append((done, of)))
    assert photo[:5] == ("photo", 2, 6, None, "3 images cannot be decoded") and not photo.ok
    assert [sentence.partition(" ")[0] for sentence in photo.unreadable] == [
        str(folders_ / name) for name in ("bad.jpg", "cut.jpg", "notes.png")
    ]
    assert sketch == ("sketch", 2, 2, None, "", ()) and sketch.ok
    assert seen == [(done, 8) for done in range(1, 9)]


def test_check_of_the_digits() -> None:
    rows = folders.check("digits", None)
    assert [row.images for row in rows] == [450, 449, 449, 449]
    assert all(row.ok and row.classes == 10 for row in rows)


@pytest.mark.slow
@needs_pacs
def test_check_of_pacs() -> None:
    rows = folders.check("PACS", PACS.parent)
    assert [(row.domain, row.images) for row in rows] == list(catalog.CATALOG["PACS"].domains.items())
    assert all(row.ok and row.classes == 7 for row in rows)


def test_check_reports_what_is_off(tmp_path: Path) -> None:
    classes = catalog.CATALOG["PACS"].classes
    assert not isinstance(classes, int)
    for domain in ("art_painting", "photo", "sketch", "sketches"):
        for each in classes:
            picture(tmp_path / "PACS" / domain / each / "1.png")
    (tmp_path / "PACS" / "photo" / "dog" / "1.png").unlink()
    (tmp_path / "PACS" / "photo" / "zebra").mkdir()
    assert [row[:5] for row in folders.check("PACS", tmp_path)] == [
        ("art_painting", 7, 7, 2048, "2,041 images fewer than 2,048"),
        ("cartoon", 0, 0, 2344, "there is no such folder"),
        ("photo", 6, 6, 1670, "no images of dog; unknown classes zebra; 1,664 images fewer than 1,670"),
        ("sketch", 7, 7, 3929, "3,922 images fewer than 3,929"),
        ("sketches", 0, 0, 0, "no domain of this data set"),
    ]
    assert not any(row.ok for row in folders.check("PACS", tmp_path))
    with pytest.raises(
        UserError, match=r"PACS is not in .*: expected a folder with .* `flatlab data check PACS` lists"
    ):
        data_load.load("PACS", data_dir=tmp_path)
    with pytest.raises(UserError, match="VLCS is not in"):
        folders.check("VLCS", tmp_path)


def test_check_of_a_folder_compares_its_domains(tree: Path) -> None:
    (tree / "sketch" / "dog" / "palette.gif").unlink()
    assert folders.check("folder:animals", tree)[1].off == "no images of dog"


# --- batches ---------------------------------------------------------------------------------------------------------


def stream(rows: dict[str, np.ndarray] | None = None, *, batch_size: int = 8, seed: int = 0) -> TrainingStream:
    rows = rows or {name: split(50, index, trial_seed=0).in_ for index, name in enumerate(("first", "second"))}
    return TrainingStream(tagged(), rows, batch_size=batch_size, seed=seed, device=CPU)


def drawn(source: TrainingStream, step: int) -> list[int]:
    """The tags of the images in a batch: row numbers, and 100 more for the second domain."""
    return source.batch(step).inputs[:, 0, 0, 0].round().int().tolist()


def test_batch_has_its_share_of_each_domain_in_index_order() -> None:
    batch = stream().batch(0)
    assert batch.sizes == (8, 8)
    assert (batch.inputs.shape, batch.inputs.dtype) == ((16, 1, 2, 2), torch.float32)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    tags = drawn(stream(), 0)
    assert [tag >= 100 for tag in tags] == [False] * 8 + [True] * 8
    assert [tag % 5 for tag in tags] == batch.targets.tolist()


def test_the_stream_is_stateless_and_depends_on_its_seed() -> None:
    source = stream()
    forwards = [drawn(source, step) for step in range(4)]
    assert [drawn(source, step) for step in (3, 2, 1, 0)] == forwards[::-1]
    assert drawn(stream(), 3) == forwards[3]
    assert forwards[0] != forwards[1]
    assert drawn(stream(seed=1), 0) != forwards[0]


def test_each_domain_has_a_stream_of_its_own() -> None:
    rows = {"second": np.arange(50), "first": np.arange(50)}
    first, second = drawn(stream(rows), 5)[:8], drawn(stream(rows), 5)[8:]
    assert [tag - 100 for tag in second] != first
    assert drawn(stream({"second": np.arange(50)}), 5) == second
    assert drawn(stream(dict(reversed(rows.items()))), 5) == first + second


def test_stream_draws_from_the_inside_with_replacement() -> None:
    inside = split(50, 0, trial_seed=0).in_  # 40 rows
    source = stream({"first": inside}, batch_size=100)
    counts = np.bincount([tag for step in range(40) for tag in drawn(source, step)], minlength=50)
    assert set(np.flatnonzero(counts)) == set(inside)
    # 4,000 draws of 40 rows: chi-squared with 39 degrees of freedom lies between 16 and 73 but for one in 1,000
    assert 16 < ((counts[inside] - 100) ** 2 / 100).sum() < 73


def test_stream_refuses_nothing_to_draw_from() -> None:
    with pytest.raises(UserError, match="at least one source domain, and at least one row of each"):
        stream({"first": np.arange(0)})


def test_evaluation_batches_cover_all_rows_in_order() -> None:
    rows = split(50, 1, trial_seed=0).in_
    batches = evaluation_batches(tagged(), "second", rows, device=CPU, batch_size=15)
    assert [len(targets) for _, targets in batches] == [15, 15, 10]
    tags = torch.cat([inputs[:, 0, 0, 0] for inputs, _ in batches]).round().int().numpy()
    assert np.array_equal(tags, rows + 100)
    assert torch.equal(torch.cat([targets for _, targets in batches]), torch.from_numpy(rows % 5))
    assert all(inputs.is_contiguous(memory_format=torch.channels_last) for inputs, _ in batches)


@pytest.mark.parametrize(("side", "expected"), [(2, 512), (64, 64), (224, 16)])
def test_few_large_images_are_evaluated_at_once_on_a_cpu(side: int, expected: int) -> None:
    domain = Domain("only", torch.zeros(520, 3, side, side, dtype=torch.uint8), torch.zeros(520, dtype=torch.int64))
    data = DomainSet("large", (domain,), ("a",), mean=(0.0,) * 3, std=(1.0,) * 3)
    batches = evaluation_batches(data, "only", np.arange(520), device=CPU)
    assert len(batches[0][1]) == expected
    assert sum(len(targets) for _, targets in batches) == 520


def test_evaluation_limit_takes_the_first_rows() -> None:
    rows = split(50, 1, trial_seed=0).in_
    ((inputs, targets),) = evaluation_batches(tagged(), "second", rows, device=CPU, limit=7)
    assert np.array_equal(inputs[:, 0, 0, 0].round().int().numpy(), rows[:7] + 100)
    assert len(targets) == 7
    assert evaluation_batches(tagged(), "second", rows[:0], device=CPU) == []
