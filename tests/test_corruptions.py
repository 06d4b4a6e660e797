"""Corruptions of images: damage by severity, draws by name, and what is refused."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from commandline import TINY as WORDS
from commandline import call, only_run
from PIL import Image
from stores import ERM, PLACE, trained

from flatlab.data import digits
from flatlab.data.corruptions import PHOTOGRAPHS, SMALL_IMAGES, Corruption, corrupted, with_corrupted
from flatlab.data.domains import Domain, DomainSet
from flatlab.data.images import Decoded
from flatlab.errors import UserError
from flatlab.measure.inputs import images
from flatlab.measure.runner import measure
from flatlab.report import sphere
from flatlab.specs import methods
from flatlab.specs.measurements import GradCAMSpec, SizeSpec, SpectrumSpec, SphereSpec, SurfaceSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import PAPER
from flatlab.store.runs import RunStore

DRAWN = {"gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "fog", "speckle_noise"}
LEVELS = range(1, 6)


@pytest.fixture(scope="module")
def embedded() -> DomainSet:
    return digits.load()


@pytest.fixture(scope="module")
def pictures(embedded):
    return torch.cat([domain.images[:15] for domain in embedded.domains])


def photograph(size=96):
    """A smooth picture in three colours."""
    y, x = np.mgrid[:size, :size] / size
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(9 * x * y)])
    return torch.from_numpy(np.rint(127.5 + 100 * waves).astype(np.uint8))


def damage(pictures, name, severity):
    """The mean squared distance (of levels) to the clean images."""
    found = [Corruption(name, severity).apply(each, row) for row, each in enumerate(pictures)]
    return float((torch.stack(found).double() - pictures.double()).square().mean())


@pytest.mark.parametrize("name", sorted(SMALL_IMAGES.keys() - {"glass_blur", "motion_blur"}))
def test_each_severity_damages_more_than_the_one_before(name, pictures):
    found = [0.0, *(damage(pictures, name, severity) for severity in LEVELS)]
    assert np.all(np.diff(found) > 0), found


def test_the_published_constants_of_two_blurs_do_not_damage_in_order(pictures):
    glass = [damage(pictures, "glass_blur", severity) for severity in LEVELS]
    sigmas, _, swaps = zip(*SMALL_IMAGES["glass_blur"][1], strict=True)
    for times in (1, 2):  # with as many swaps, a wider blur damages less
        same = [place for place, count in enumerate(swaps) if count == times]
        assert sorted(same, key=sigmas.__getitem__) == same and glass[same[0]] > glass[same[-1]], glass
    assert min(glass[3:]) > max(glass[:3]) > 0  # and more swaps damage more
    motion = [damage(pictures, "motion_blur", severity) for severity in LEVELS]
    assert 0 < motion[0] < motion[1] < motion[2] == pytest.approx(motion[3], rel=1e-3) and motion[3] < motion[4]
    (_, sigma), (_, same) = SMALL_IMAGES["motion_blur"][1][2:4]
    assert sigma == same


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_draws_follow_from_names(name, pictures):
    first = Corruption(name, 3).apply(pictures[0], "rot0", 7)
    assert (first.dtype, first.shape) == (torch.uint8, pictures[0].shape)
    assert torch.equal(first, Corruption(name, 3).apply(pictures[0], "rot0", 7))
    others = [Corruption(name, 3, seed=1).apply(pictures[0], "rot0", 7), Corruption(name, 3).apply(pictures[0], "rot0")]
    assert all(torch.equal(first, other) != (name in DRAWN) for other in others)


@pytest.mark.parametrize("name", SMALL_IMAGES)
def test_colours_and_extremes_stay_bytes(name):
    colours = photograph(32)
    for image in (colours, torch.zeros_like(colours), torch.full_like(colours, 255)):
        found = Corruption(name, 5).apply(image)
        assert (found.dtype, found.shape) == (torch.uint8, image.shape)
    grey = colours[:1].expand(3, -1, -1)
    if name in ("brightness", "contrast", "gaussian_blur", "defocus_blur", "zoom_blur", "fog", "pixelate"):
        one = Corruption(name, 5).apply(colours[:1])
        assert torch.equal(Corruption(name, 5).apply(grey), one.expand(3, -1, -1))  # channels are treated alike


def test_some_values_by_hand():
    image = torch.tensor([[[0, 100], [200, 255]]], dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert Corruption("brightness", 3).apply(image).unique().tolist() == [38, 138, 238, 255]  # 0.15 * 255 = 38.25
    assert Corruption("contrast", 2).apply(image).unique().tolist() == [69, 119, 169, 197]  # the mean is 138.75
    noisy = Corruption("impulse_noise", 5).apply(torch.full((1, 64, 64), 100, dtype=torch.uint8))
    share = (noisy != 100).double().mean()
    assert noisy.unique().tolist() == [0, 100, 255] and abs(share - 0.07) < 4 * (0.07 * 0.93 / 4096) ** 0.5
    flat = torch.full((3, 16, 16), 77, dtype=torch.uint8)
    for name in ("gaussian_blur", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"):
        assert torch.equal(Corruption(name, 5).apply(flat), flat), name
    spread = (Corruption("gaussian_noise", 5).apply(torch.full((1, 64, 64), 128, dtype=torch.uint8)) / 255.0).std()
    assert float(spread) == pytest.approx(0.1, rel=0.05)


def test_a_corrupted_data_set_has_the_rows_in_their_order(embedded):
    rows = {"rot45": np.array([5, 2, 9]), "rot0": np.array([0])}
    found = corrupted(embedded, "Gaussian-Noise:3", rows)
    assert found.names == ("rot45", "rot0") and found.fingerprint != embedded.fingerprint
    assert torch.equal(found.domains[0].labels, embedded.domain("rot45").labels[[5, 2, 9]])
    again = corrupted(embedded, "gaussian_noise:3", {"rot45": np.array([9, 5])})
    assert torch.equal(again.domains[0].images, found.domains[0].images[[2, 0]])  # whatever else is corrupted
    assert found.normalise(found.domains[0].images).shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "gaussian_noise:0",
            r"severity must be an integer from 1 to 5, got 'gaussian_noise:0': write gaussian_noise:3\.",
        ),
        ("fog:6", "severity must be an integer from 1 to 5, got 'fog:6'"),
        ("fog", "severity must be an integer from 1 to 5, got 'fog'"),
        ("fgo:3", "Unknown corruption 'fgo'; did you mean fog"),
        ("frost:3", "Unknown corruption 'frost'"),
    ],
)
def test_what_is_no_corruption_is_refused(text, match, embedded):
    with pytest.raises(UserError, match=match):
        corrupted(embedded, text, {"rot0": np.arange(3)})


# --- as measured -------------------------------------------------------------------------------------------------


def test_a_corruption_changes_a_measurements_name_and_no_corruption_does_not():
    for clean in (SphereSpec(radii=(1.0,)), SpectrumSpec(), SurfaceSpec()):
        assert "corruption" not in clean.model_dump() and "corruption" not in clean.canonical()
        under = clean.replace(corruption="Gaussian-Noise:3")
        assert under.corruption == "gaussian_noise:3" and under.digest != clean.digest
        assert type(clean).parse(under.canonical()) == under
    for kind in (SizeSpec, GradCAMSpec):
        with pytest.raises(UserError, match="corruption"):
            kind.make(corruption="fog:3")
    with pytest.raises(UserError, match="corruption must be NAME:SEVERITY with a severity from 1 to 5.*, got 'fog'"):
        SpectrumSpec.make(corruption="fog")


def test_a_measurement_looks_at_the_same_images_corrupted(tmp_path, embedded):
    run = trained(tmp_path, ERM).run(ERM)
    clean, under = (
        images(run, SphereSpec(radii=(1.0,), images=30, split="out", corruption=each), PLACE)
        for each in (None, "fog:5")
    )
    assert list(clean) == list(under) == list(embedded.names)
    for name, batches in clean.items():
        ((x, y),), ((changed, same),) = batches, under[name]
        assert x.shape == changed.shape == (30, 1, 16, 16) and torch.equal(y, same)
        assert changed.mean() > x.mean()  # fog is white
        assert changed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_the_words_of_a_corruption(tmp_path, capsys):
    assert call("train", *WORDS, "--store", tmp_path / "runs", "--json") == 0
    run, place = only_run(tmp_path / "runs"), ("--store", tmp_path / "runs", "--out", tmp_path)
    few = ("--radii", "0.5", "--samples", 2, "--images", 9, "--domains", "target")
    assert call("flatness", run, *few, "--corruption", "Shot-Noise:5", *place) == 0
    assert "domain under shot_noise:5 (nats)" in capsys.readouterr().out
    assert ",shot_noise:5," in (tmp_path / "flatness.csv").read_text().splitlines()[1]
    numbers = ("-k", 1, "--images", 5, "--lanczos-steps", 2, "--starts", 1)
    assert call("hessian", run, *numbers, "--corruption", "fog:1", *place) == 0
    assert "source under fog:1" in (tmp_path / "hessian.csv").read_text()
    capsys.readouterr()
    least = ("--images", 5, "--corruption", "fog:1", *place)
    assert call("noise", run, "--radius", "--samples", 2, *least) == 0
    assert "under fog:1" in capsys.readouterr().out and ",fog:1" in (tmp_path / "radius.csv").read_text()
    assert call("landscape", run, "--grid", 3, "--rel-error", 0.5, *least) == 0
    said = capsys.readouterr().err
    assert "Images under fog:1." in said and "under fog:1: Trace of the Hessian" in said
    assert call("audit", run, "--samples", 2, *least) == 0
    assert "under fog:1: rescaled" in capsys.readouterr().err
    assert call("noise", run, "--corruption", "fog:1", *place) == 2
    assert "--corruption does nothing without --radius" in capsys.readouterr().err
    for words, match in {
        "fog": "--corruption must be NAME:SEVERITY with a severity from 1 to 5, such as gaussian_noise:3, got fog.",
        "fog:0": "--corruption must be NAME:SEVERITY with a severity from 1 to 5, such as gaussian_noise:3, got fog:0.",
        "frost:2": "Unknown corruption 'frost'; did you mean fog? Known: gaussian_noise, shot_noise",
    }.items():
        assert call("flatness", run, *few, "--corruption", words, "--dry-run", *place) == 2
        said = capsys.readouterr().err
        assert match in said and said.count("\n") == 1


# --- as an unseen domain ----------------------------------------------------------------------------------------


def test_a_runs_corruption_changes_its_name_and_no_corruption_does_not():
    assert "corruption" not in ERM.canonical() and ERM.target == ERM.held_out
    under = ERM.replace(corruption="Fog:5")
    assert under.target == f"{ERM.held_out} under fog:5" and under.digest != ERM.digest
    assert RunSpec.parse(under.canonical()) == under
    with pytest.raises(UserError, match="must have the same data set, held-out domain and image size"):
        ERM.replace(members=(ERM, under))


def test_the_held_out_domain_of_a_run_is_corrupted_and_its_training_is_not(tmp_path):
    under = ERM.replace(corruption="fog:5")
    store = trained(tmp_path, ERM)
    trained(tmp_path, under)
    runs = store.run(ERM), store.run(under)
    arrays, same = (run.arrays(run.checkpoint("last"))[0] for run in runs)
    assert arrays.keys() == same.keys() and all(np.array_equal(arrays[name], same[name]) for name in arrays)
    clean, fogged = (run.rows()[-1] for run in runs)
    assert clean["validation"] == fogged["validation"] and clean["target"] != fogged["target"]
    assert runs[0].provenance["data_fingerprint"] == runs[1].provenance["data_fingerprint"]
    spec = SphereSpec(radii=(1.0,), images=30)
    asked, made = images(runs[0], spec.replace(corruption="fog:5"), PLACE), images(runs[1], spec, PLACE)
    for name in asked:
        (changed, _), (own, _) = asked[name][0], made[name][0]
        assert torch.equal(changed, own) == (name == ERM.held_out)


def test_no_verdict_compares_runs_on_other_images(tmp_path):
    under, elsewhere = ERM.replace(corruption="contrast:5"), ERM.replace(trial_seed=1)
    store, asked = trained(tmp_path, ERM), SphereSpec(radii=(3.0,), images=30, num_samples=20)
    trained(tmp_path, under)
    trained(tmp_path, elsewhere)
    runs = [store.run(each) for each in (ERM, under, elsewhere)]
    for run in runs:
        measure(run, asked, PLACE)
    for panel, others in {"target": runs[1:], "source": runs[2:]}.items():
        said = sphere.remarks(runs, asked, panel=panel)
        refused = [
            f"{each.name} has other images than {runs[0].name}: no verdict on which is flatter." for each in others
        ]
        assert [line for line in said if "no verdict on" in line] == refused
        assert not [line for line in said if "is flatter" in line and "no verdict on" not in line]


def test_files_that_are_decoded_on_access_are_also_corrupted_on_access(tmp_path):
    pictures = torch.stack([photograph(32), photograph(32).flip(2), photograph(32).flip(1)])
    paths = [tmp_path / f"{row}.png" for row in range(len(pictures))]
    for picture, path in zip(pictures, paths, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    labels = torch.tensor([0, 1, 1])
    sets = (
        DomainSet("set", (Domain("photo", each, labels), Domain("other", each, labels)), ("a", "b"), (0.5,), (1,), "s")
        for each in (pictures, Decoded(paths, 32))
    )
    kept, read = (with_corrupted(each, "shot_noise:5", "photo") for each in sets)
    rows, device = torch.tensor([2, 0]), torch.device("cpu")
    assert torch.equal(kept.domain("photo").images[rows], read.domain("photo").images.to(device)[rows])
    assert not torch.equal(kept.domain("photo").images[rows], pictures[rows])
    assert torch.equal(read.domain("other").images[rows], pictures[rows])


@pytest.mark.slow
def test_every_command_that_makes_runs_takes_a_corruption(tmp_path, capsys):
    store, under = ("--store", tmp_path / "runs"), ("--corruption", "Gaussian-Noise:5")
    place = (*store, "--out", tmp_path)
    for seed in (0, 1):
        assert call("train", *WORDS, *store, *under, "--keep-every", 2, "--seed", seed) == 0
    assert "and target under gaussian_noise:5, by" in capsys.readouterr().out
    assert call("replay", "ERM", *place) == 0
    assert call("ensemble", *[run.spec.digest for run in RunStore(tmp_path / "runs").runs()], *store) == 0
    assert call("report", "ERM", *place) == 0
    assert "under gaussian_noise:5 correctly" in (tmp_path / "report.html").read_text()
    capsys.readouterr()
    few = ("--radii", 1, "--samples", 2, "--images", 9, "--domains", "target")
    for words in (("flatness", "ERM", *few), ("stability", "ERM"), ("replay", "ERM")):
        assert call(*words, *place) == 0
        assert "under gaussian_noise:5" in capsys.readouterr().out
    assert call("runs", "list", *store, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert {(row["held_out"], row["corruption"]) for row in listed} == {("rot0", "gaussian_noise:5")}
    assert call("flatness", "ERM", "--radii", 1, "--corruption", "fog:1", *place) == 2
    assert "are corrupted already, by gaussian_noise:5; leave --corruption fog:1 out" in capsys.readouterr().err
    assert call("reproduce", "fig4", "--setting", "smoke", "--held-out", 0, *under, *place) == 0
    page = (tmp_path / "digits-digits-cnn-gaussian_noise-5" / "fig4.md").read_text()
    assert "held-out images under gaussian_noise:5" in page


def test_corruptions_are_refused_before_any_training(tmp_path, capsys):
    for words, match in {
        ("--dataset", "sentences", "--corruption", "fog:1"): "Corruptions change images, and sentences has sentences",
        ("--corruption", "frost:1"): "Unknown corruption 'frost'; did you mean fog?",
        ("--corruption", "fog:6"): "--corruption must be NAME:SEVERITY with a severity from 1 to 5",
    }.items():
        assert call("train", *words, "--store", tmp_path) == 2
        assert match in capsys.readouterr().err
    assert call("reproduce", "table3", "--setting", "smoke", "--corruption", "fog:1", "--store", tmp_path) == 2
    assert "sentences has sentences, not images; leave --corruption fog:1 out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_number_of_the_paper_stands_beside_corrupted_images():
    assert methods.is_papers(methods.METHODS["ERM"], PAPER)
    assert not methods.is_papers(methods.METHODS["ERM"], PAPER.replace(corruption="fog:1"))


# --- photographs -------------------------------------------------------------------------------------------------


def photographs():
    domain = Domain("photo", torch.stack([photograph(), photograph().flip(2)]), torch.tensor([0, 1]))
    return DomainSet("pair", (domain,), ("a", "b"), mean=(0.5,) * 3, std=(0.5,) * 3)


def test_photographs_without_the_package_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(UserError, match=r"imagecorruptions: pip install 'flatlab\[corruptions\]', or choose a smaller"):
        corrupted(photographs(), "frost:3", {"photo": np.arange(2)})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("imagecorruptions") is None, reason="flatlab[corruptions] is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_are_corrupted_by_the_package(name):
    data, rows = photographs(), {"photo": np.arange(2)}
    before = np.random.get_state()[1].copy()
    found = corrupted(data, f"{name}:5", rows)
    assert np.array_equal(before, np.random.get_state()[1])
    images = found.domains[0].images
    assert (images.dtype, images.shape) == (torch.uint8, data.domains[0].images.shape)
    assert not torch.equal(images, data.domains[0].images)
    assert torch.equal(images, corrupted(data, f"{name}:5", rows).domains[0].images)
    assert replace(data, stamp=None).fingerprint != found.fingerprint
