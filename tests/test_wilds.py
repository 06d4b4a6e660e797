"""WILDS' folders in their exact layout, tiny: named splits, groups, both metrics, and what is refused."""

import csv

import commandline
import numpy as np
import pytest
import torch
from PIL import Image

from analyses import table3
from flatlab.data import catalog, fingerprints, folders, wilds
from flatlab.data.domains import numbered
from flatlab.data.load import load
from flatlab.data.text.vocabulary import Vocabulary
from flatlab.errors import UserError
from flatlab.loading.data import domains
from flatlab.specs.run import Place, RunSpec
from flatlab.specs.settings import PAPER, QUICK, SMOKE, for_data
from flatlab.store import selection
from flatlab.store.runs import RunStore
from flatlab.train.evaluate import evaluate

HEADER = ("reviewerID", "asin", "overall", "reviewTime", "unixReviewTime", "reviewText", "summary", "verified")
HEADER += ("category", "reviewYear")
WORDS = {"1": "awful", "2": "poor", "3": "fair, really", "4": "good", "5": 'a "great"\nbook'}


def amazon(root):
    """Write reviews.csv and splits/user.csv as pandas writes them, with quotes, commas and line breaks in texts."""
    folder = root / "amazon_v2.1"
    (folder / "splits").mkdir(parents=True)
    reviews, splits = [], []
    for split in (0, 1, 2, 3, 4, -1):
        for index in range(20 if split == 0 else 10):
            stars = str(1 + index % 5)
            reviewer = f"A{split if split in (1, 3) else 0}{index % 3}"  # those of val and test are nobody else
            text = f"{WORDS[stars]} {'kept' if split else 'seen'}{split}"
            reviews.append((reviewer, "B0", float(stars), "01 1, 2014", 1, text, "s", True, "Books", 2014))
            splits.append(split)
    with (folder / "reviews.csv").open("w", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_NONNUMERIC).writerows([HEADER, *reviews])
    (folder / "splits" / "user.csv").write_text("\n".join(["split,clean", *(f"{each},1" for each in splits)]) + "\n")
    return folder


def camelyon(root):
    """Write metadata.csv, with an index and the column split that WILDS has, and the patches that it names."""
    folder, draw = root / "camelyon17_v1.0", np.random.default_rng(0)
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for center in range(5):
        for index in range(12):
            patient, tumor = f"{20 * center:03}", index % 2
            lines.append(f"{len(lines) - 1},{patient},{center},{index},96,{tumor},{center},{center},{int(index > 7)}")
            patches = folder / "patches" / f"patient_{patient}_node_{center}"
            patches.mkdir(parents=True, exist_ok=True)
            pixels = (draw.integers(0, 120, (12, 12, 3)) + 100 * tumor).astype(np.uint8)
            Image.fromarray(pixels).save(patches / f"patch_patient_{patient}_node_{center}_x_{index}_y_96.png")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def run_of(dataset, root, **changes):
    fields = {"dataset": dataset, "held_out": "test", "image_size": 12, "steps": 1, "eval_every": 1, "lr": 1e-3}
    return RunSpec(**{**fields, "model": "digits-cnn", **changes}), Place(data_dir=str(root))


def test_amazon_has_its_named_splits_stars_and_reviewers(tmp_path):
    root = amazon(tmp_path)
    found = wilds.reviews(root)
    assert {name: len(table.texts) for name, table in found.items()} == {
        **{name: 10 for name in ("id_test", "id_val", "test", "val")},
        "train": 20,
    }
    train = found["train"]
    assert train.labels[:5] == wilds.STARS and train.texts[2:5:2] == ("fair, really seen0", 'a "great"\nbook seen0')
    assert set(found["test"].groups) == {"A30", "A31", "A32"} and not {*train.groups} & {*found["val"].groups}
    run = domains(*run_of("Amazon", tmp_path, model="sentences-transformer"))
    assert (run.sources, run.target, run.validated) == (("train",), "test", ("val",))
    assert [sorted(each) for each in (run.in_, run.out, run.test)] == [["test", "train"], ["val"], ["id_test"]]
    assert sorted(run.in_["train"].tolist()) == list(range(20)) != run.in_["train"].tolist()
    assert run.data.vocabulary.numbers == Vocabulary(train.texts).numbers  # of the training split alone
    assert run.data.fingerprint == fingerprints.at_hand("amazon", str(root), None)
    (root / "splits" / "user.csv").write_text((root / "splits" / "user.csv").read_text().replace("3,1", "-1,1", 1))
    assert len(wilds.reviews(root)["test"].texts) == 9  # a changed file is read again


def test_camelyon17_has_its_named_splits_and_hospitals(tmp_path):
    root = camelyon(tmp_path)
    data = load("camelyon17", data_dir=tmp_path, image_size=12)
    assert {domain.name: len(domain) for domain in data.domains} == {"id_val": 12, "test": 12, "train": 24, "val": 12}
    assert data.classes == ("normal", "tumor")
    bright = torch.stack([domain.images[:].float().mean((1, 2, 3)) > 100 for domain in data.domains[:1]])[0]
    assert torch.equal(bright.long(), data.domains[0].labels)  # each patch has the label of its line
    assert data.domain("train").groups.unique().tolist() == [0, 1, 2] and not data.domain("test").groups.any()
    whole = load("Camelyon17-hospitals", data_dir=root, image_size=12)
    assert (
        whole.names == tuple(f"hospital_{center}" for center in range(5)) and whole.domain("hospital_2").groups is None
    )
    drawn = domains(*run_of("Camelyon17-hospitals", tmp_path, held_out="hospital_3"))
    assert drawn.sources == ("hospital_0", "hospital_1", "hospital_2", "hospital_4") == drawn.validated
    assert catalog.sizes("Camelyon17-hospitals", tmp_path) == dict.fromkeys(whole.names, 12)
    assert not {row.off.partition(" ")[2] for row in folders.check("Camelyon17", tmp_path)} & {"", "no images"}


def test_only_the_test_split_is_held_out_and_named_splits_have_no_second_part(tmp_path):
    assert catalog.held_out("Camelyon17", None, "all") == catalog.held_out("Amazon", None, "0") == ("test",)
    with pytest.raises(UserError, match="held-out domain"):
        catalog.held_out("Amazon", None, "val")
    assert list(catalog.sizes("Amazon", None)) == ["train", "test"]
    camelyon(tmp_path)
    run = domains(*run_of("Camelyon17", tmp_path))
    with pytest.raises(UserError, match='split test of Camelyon17 has one part, got split="out": write split="in"'):
        run.measured("out")


def test_the_percentile_is_over_reviewers_and_selects():
    network = torch.nn.Linear(3, 2)
    inputs, targets = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
    groups = numbered([f"user {index % 7}" for index in range(30)])
    batches = {"in": list(zip(inputs.split(8), targets.split(8), strict=True))}
    score = evaluate(network, batches, percentile=10, groups={"in": groups})["in"]
    hits = (network(inputs).argmax(1) == targets).double()
    expected = np.percentile([hits[groups == each].mean().item() for each in range(7)], 10)  # as WILDS computes it
    assert score["class_percentile"] == pytest.approx(expected, abs=1e-12)
    assert score["class_percentile"] != evaluate(network, batches, percentile=10)["in"]["class_percentile"]


@pytest.mark.slow
def test_amazon_is_trained_measured_and_tabulated(tmp_path):
    amazon(tmp_path)
    words = ("--dataset", "amazon", "--data-dir", tmp_path, "--setting", "smoke", "--seeds", "1", "--image-size", "8")
    here = ("--store", tmp_path / "runs")
    assert commandline.call("reproduce", "table3", *words, *here, "--out", tmp_path / "out") == 0
    runs = [run for run in RunStore(tmp_path / "runs").runs() if run.done]
    assert {(run.spec.held_out, run.spec.optimizer, run.spec.class_percentile) for run in runs} == {
        ("test", "adamw", 10)
    }
    for row in runs[0].rows():
        assert (set(row["source"]), set(row["test"]), set(row["target"])) == ({"val"}, {"id_test"}, {"in"})
        assert row["validation"] == row["source"]["val"]["class_percentile"]
        assert "oracle" not in selection.rules([row])
    page = (tmp_path / "out" / "amazon-sentences-transformer" / "table3.md").read_text()
    assert "held-out domain, percentile over groups" in page and "source domains, test split, percentile over" in page
    assert (
        "accuracies of reviewers" in page and "is the average accuracy out of distribution of WILDS' own table" in page
    )
    sizes = ("--radii", "0.5", "--samples", "2", "--images", "4", "--out", tmp_path / "flat", "--data-dir", tmp_path)
    assert commandline.call("flatness", "QT-DoG", *sizes, *here, "--held-out", "test") == 0


def test_camelyon17_is_trained_for_epochs_of_its_training_split(tmp_path):
    camelyon(tmp_path)
    words = ("--dataset", "Camelyon17", "--data-dir", tmp_path, "--setting", "smoke", "--model", "digits-cnn")
    more = ("--image-size", "12", "--seeds", "1", "--cache", tmp_path / "cache", "--class-percentile", "10")
    assert commandline.call("train", *words, *more, "--store", tmp_path / "runs") == 0
    (run,) = RunStore(tmp_path / "runs").runs()
    (row, *_) = run.rows()
    assert (set(row["source"]), set(row["test"])) == ({"val"}, {"id_val"}) and row["target"]["in"]["n"] == 12
    assert row["target"]["in"]["class_percentile"] == row["target"]["in"]["accuracy"]  # one hospital
    assert commandline.call("train", *words, *more[:2], "--held-out", "val", "--store", tmp_path / "runs") == 2


def test_the_papers_protocol_is_that_of_wilds_code():
    named = {"domains": ("train", "test"), "held_out": ("test",), "named": True}
    text = table3.TABLE.suited(for_data(PAPER, "Amazon", model="hf:bert@0", weights="sha256:0").replace(**named))
    assert (text.optimizer, text.lr, text.weight_decay, text.schedule) == ("adamw", 1e-5, 0.01, "linear")
    assert (text.clip_norm, text.batch_size, text.image_size, text.class_percentile) == (1.0, 8, 512, 10.0)
    assert (text.steps + 1, text.eval_every) == (3 * 30688, 30688)
    patches = table3.TABLE.suited(for_data(PAPER, "Camelyon17").replace(**named))
    assert (patches.model, patches.weights, patches.optimizer, patches.momentum) == ("densenet121", "none", "sgd", 0.9)
    assert (patches.lr, patches.weight_decay, patches.batch_size, patches.image_size) == (1e-3, 0.01, 32, 96)
    assert (patches.steps + 1, patches.eval_every, patches.augment) == (5 * 9452, 9452, "none")
    epochs = patches.replace(epochs=5, sizes=(302436, 85054), test_share=0.2)
    assert epochs.in_steps("test").steps == patches.steps  # all of the training split is trained on
    caption = table3.FIGURE.caption(patches)
    assert "selected on val" in caption and "10 % quantile of the accuracies of hospitals" in caption
    for one in (SMOKE, QUICK):
        asked = for_data(one, "Camelyon17").replace(**named, optimizer="adamw")
        assert table3.TABLE.suited(asked).optimizer == "adamw"  # what was asked for stays


def rewritten(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


BROKEN = {  # file, text, what replaces it, sentence
    "no column": ("reviews.csv", "reviewText", "text", r"reviews.csv must have the column reviewText, got reviewerID"),
    "stars": (
        "reviews.csv",
        "2.0",
        "7.0",
        r"Line 3 of .*reviews.csv must have one of 1, .*5.0 as overall, got '7.0'",
    ),
    "values": (
        "reviews.csv",
        '"awful seen0",',
        "",
        r"Line 2 of .*reviews.csv must have 10 values, as the header, got 9",
    ),
    "split": (
        "splits/user.csv",
        "0,1",
        "9,1",
        r"Line 2 of .*user.csv must have one of 0, 1, 2, 3, 4 as split, got '9'",
    ),
    "fewer rows": ("splits/user.csv", "0,1\n", "", r"must have the same number of rows, but splits/user.csv has fewer"),
    "fewer reviews": ("splits/user.csv", "0,1\n", "0,1\n0,1\n", r"same number of rows, but reviews.csv has fewer"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_of_amazon_is_named(tmp_path, fault):
    root, (name, old, new, sentence) = amazon(tmp_path), BROKEN[fault]
    rewritten(root / name, old, new)
    with pytest.raises(UserError, match=sentence):
        wilds.reviews(root)


def test_what_is_missing_or_no_table_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Amazon is not in .*: expected a folder with reviews.csv, splits/user.csv"):
        catalog.locate("Amazon", tmp_path)
    root = amazon(tmp_path)
    (root / "reviews.csv").write_bytes((root / "reviews.csv").read_bytes() + b'"A\xff')
    with pytest.raises(UserError, match=r"reviews.csv must be UTF-8 text"):
        wilds.reviews(root)
    (root / "reviews.csv").write_text(",".join(HEADER) + '\n"' + "x" * 200_000)
    with pytest.raises(UserError, match=r"Line \d+ of .*reviews.csv is not CSV \(field larger"):
        wilds.reviews(root)
    (root / "reviews.csv").write_text("")
    with pytest.raises(UserError, match=r"reviews.csv must have the column overall, got no header"):
        wilds.reviews(root)
    (root / "splits" / "user.csv").write_text("split\n")
    (root / "reviews.csv").write_text(",".join(HEADER) + "\n")
    with pytest.raises(UserError, match=r"must name rows of each split, got none of id_test, id_val, test, train, val"):
        wilds.reviews(root)
    assert commandline.call("data", "check", "Amazon", "--data-dir", tmp_path) == 2


PATCHES = {  # text of metadata.csv, what replaces it, sentence
    "tumor": ("000,0,0,96,0", "000,0,0,96,2", r"Line 2 of .*metadata.csv must have one of 0, 1 as tumor, got '2'"),
    "a path": (
        "000,0,0,96",
        "../x,0,0,96",
        r"Line 2 of .*metadata.csv must have a whole number as patient, got '../x'",
    ),
    "center": (",0,0,0\n", ",0,7,0\n", r"Line 2 of .*metadata.csv must have one of 0, 1, 2, 3, 4 as center, got '7'"),
    "split": (",0,0,0\n", ",0,0,3\n", r"Line 2 of .*metadata.csv must have one of 0, 1 as split, got '3'"),
    "no file": ("000,0,0,96", "000,0,77,96", r"There is no file .*x_77_y_96.png, which metadata.csv names"),
}


@pytest.mark.parametrize("fault", PATCHES)
def test_a_broken_line_of_camelyon17_is_named(tmp_path, fault):
    root, (old, new, sentence) = camelyon(tmp_path), PATCHES[fault]
    rewritten(root / "metadata.csv", old, new)
    with pytest.raises(UserError, match=sentence):
        load("Camelyon17", data_dir=tmp_path, image_size=12, cache=tmp_path / "cache")
