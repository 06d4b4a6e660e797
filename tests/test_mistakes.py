"""Every mistake is one sentence on standard error that says what to write instead, and exit code 2."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from commandline import PETS, TINY, call, only_run, pets

from flatlab import files, reproduce
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore

WORDS = {  # what the user writes -> what the answer names, before anything heavy is loaded
    "trian": r"'trian'.*'train'.*flatlab --help",
    "runs lst": r"'lst'.*'list'.*flatlab runs --help",
    "train --methd sam": r"--methd.* --method\b.*flatlab train --help",
    "train --method swdd": r"method 'swdd'.* SWAD\?.*: ERM, SAM, SAGM, SAQ, SWA, SWAD",
    "train --step adam": r"step 'adam'.*: plain, sam, sagm, saq, gaqat, fqat\.",
    "train --average ema": r"average 'ema'.*: last, swa, swad, sma, bma\.",
    "train --quantizer lqs": r"quantizer 'lqs'.* lsq\?.*: none, lsq, lsq-both, inq, rtn, obc\.",
    "train --objective irm": r"objective 'irm'.*: erm, coral, mms\.",
    "train --model resnet": r"model 'resnet'; did you mean resnet.*: digits-cnn",
    "train --dataset PCAS": r"dataset 'PCAS'; did you mean PACS\?.*: digits, PACS",
    "train --setting huge": r"setting 'huge'.*: smoke, quick, paper\.",
    "train --device gpu": r"device 'gpu'.*: auto, cpu, cuda\.",
    "train --device cpu:7": r"--device .*cpu:7",
    "reproduce fig33": r"figure or table 'fig33'; did you mean fig3\?.*fig1\b",
    "reproduce figure-3": r"'figure-3'; did you mean fig3\?",
    "train --held-out rot20": r"held-out domain 'rot20'.*: rot0, rot15, rot30, rot45\.",
    "train --held-out 4": r"digits has no domain 4; .* 0 rot0, 1 rot15, 2 rot30, 3 rot45\.",
    "train --method qt-dog --bits 1": r"--bits .*>= 2.* 1\.",
    "train --method qt-dog --bits 17": r"--bits .*<= 16.* 17\.",
    "train --bits 4": r"--bits 4 .*--quantizer lsq",
    "train --quantize-at 4": r"--quantize-at 4 .*--quantizer lsq",
    "train --margin 0.5": r"--margin 0.5 does nothing without the margin metric softmax; add --objective mms",
    "train --margin -1": r"--margin .*>= 0.* -1\.0",
    "reproduce table5 --margin 0.1": r"--margin does nothing for table5",
    "train --select all": r"--select all does nothing without a switch; add --quantizer lsq, or leave it out\.",
    "train --test-share 0.8": r"test \(0\.8\) must sum to less than 1: choose a smaller --test-share",
    "train --test-share 1.0": r"--test-share must be a number < 1, got 1.0\.",
    "train --swad-rule released": r"--swad-rule released does nothing without SWAD; add --average swad",
    "train --method qt-dog --quantize-at 301": r"<= 300 \(--steps\), got 301.*--quantize-at",
    "train --steps 0": r"--steps .*>= 1.* 0\.",
    "train --steps ten": r"--steps.*integer",
    "train --steps=1.5": r"--steps.*integer",
    "train --steps": r"--steps.*argument.*flatlab.* --help",
    f"train --steps {10**26}": rf"--steps .*{10**26}",
    "train --eval-every 0": r"--eval-every .*>= 1.* 0\.",
    "train --batch-size 0": r"--batch-size .*>= 1.* 0\.",
    "train --seed -1": r"--seed .*>= 0.* -1\.",
    "train --trial-seed -1": r"--trial-seed .*>= 0.* -1\.",
    "train --seeds 0": r"--seeds .*>= 1.* 0\.",
    "train --workers 0": r"--workers .*>= 1.* 0\.",
    "train --image-size 0": r"--image-size .*>= 1.* 0\.",
    "train --lr -1": r"--lr .*> 0.* -1\.0",
    "train --lr nan": r"--lr .*> 0.* nan",
    "train --lr fast": r"--lr.*number",
    "train --seed 1 --seed 2": r"--seed.* twice",
    "train --dataset digits --data-dir .": r"digits.*--data-dir",
    "train --weights=": r"--weights.* empty",
    "train --method swa --keep-every 301": r"--keep-every .*301.*300",
    "train --method eoq --seeds 4": r"--seeds does nothing",
    "train --method gaqat --activation-bits 3": r"lsq-both has its own way with inputs: write --qat-bits 3\.",
    "train --method gaqat --skip-first": r"--skip-first is of the quantizer lsq; .*: leave it out\.",
    "train --method gaqat --freeze-alternate --freeze-threshold 0.2": r"--freeze-threshold does nothing beside "
    r"--freeze-alternate, which makes no decisions",
    "train --method gaqat --freeze-top 0.2 --freeze-threshold 0.2": r"beside --freeze-top, which replaces it",
    "train --method gaqat --freeze-gradient both --freeze-rescale": r"--freeze-rescale does nothing beside",
    "train --method sagm --perturb all": r"--perturb all adds step sizes, of which there are none without LSQ",
    "reproduce fig3 --datasets ,": r"dataset ''",
    "reproduce fig3 --swad-rule released --controls": r"--controls does nothing for fig3",
    "reproduce study --rows runs.csv": r"--rows does nothing without --leave-out",
    "reproduce fig3 --rows runs.csv": r"--rows does nothing for fig3; leave it out",
    "reproduce all --rows runs.csv": r"--rows does nothing for all; leave it out",
    "reproduce fig3 --leave-out SAM": r"--leave-out does nothing for fig3",
    "reproduce study --leave-out SAMM": r"Unknown method that can be left out 'SAMM'; did you mean SAM\?",
    "reproduce fig2 --swad-rule released": r"--swad-rule does nothing for fig2",
    "train --model resnet18": (
        r"resnet18 takes images of 3 channels, and digits have 1; use --model digits-cnn or another --dataset\."
    ),
    "train --image-size 32": r"digits are 16 x 16 pixels; leave --image-size 32 out\.",
    "train --weights nix.pth": r"--weights nix\.pth: no such file; must be none, imagenet, a \.safetensors or ",
    "train --setting paper": r"PACS is read from disk; pass --data-dir, a folder with art_painting, ",
    "train --dataset PACS --data-dir nix": r"PACS is not in nix or nix/PACS: .*Pass its location as --data-dir\.",
    "train --dataset folder:": r"--dataset folder:PATH must name a folder with DOMAIN/CLASS/IMAGE, got no path\.",
    "train --dataset folder:nix": r"--dataset folder:PATH must name a folder with DOMAIN/CLASS/IMAGE, got nix\.",
    "train once": r"once.*flatlab train --help",
    "flatness": r"(?i)runs.*flatlab flatness --help",
    "flatness QT-DGo --store nix": r"'QT-DGo'; did you mean QT-DoG\?",
    "flatness beef --store nix": r"No run in nix begins with 'beef'; `flatlab runs list` shows them all\.",
    "runs show beef --store nix": r"No run in nix begins with 'beef'",
    "runs merge --from nix": r"nix contains no run; a store is a folder such as \./runs\.",
    "data check PCAS": r"Unknown dataset 'PCAS'",
}

MEASURE = {  # of the finished run
    "--radii x": r"--radii .*start:stop:step.* x\.",
    "--radii 3:0:1": r"--radii .*3:0:1",
    "--radii 0:3:0": r"--radii .*0:3:0",
    "--radii 0,-1": r"--radii .*0,-1",
    "--radii nan": r"--radii .*nan",
    "--radii 1e308": r"--radii .*1e308",
    "--samples 1": r"--samples .*>= 2.* 1\.",
    "--samples few": r"--samples.*integer",
    "--samples 10 --block-size 5": r"--block-size does nothing with --samples",
    "--images 0": r"--images .*>= 1.* 0\.",
    "--domains both": r"domains 'both'.*: source, target\.",
    "--normalisation row": r"normalisation 'row'.*: none, filter, layer, parameter\.",
    "--space flat": r"space 'flat'.*: baked, latent, codes\.",
    "--space latent": r"--space latent",
    "--checkpoint best": r"checkpoint 'best'.*: selected, last\.",
    "--seed 3": r"--seed .*digests",
    "--params nix* --images 8 --samples 2": r"No trainable parameter matches 'nix\*'; available: features\.0\.weight",
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return pets(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="module")
def store(tmp_path_factory, tree):
    """A store with one run, of the pets."""
    root = tmp_path_factory.mktemp("mistakes") / "runs"
    assert call("train", *PETS, "--dataset", f"folder:{tree}", "--store", root) == 0
    return root


@pytest.fixture
def mistake(capsys):
    """Give a command; return its one sentence."""

    def make(*given: object, code: int = 2) -> str:
        capsys.readouterr()
        assert call(*given) == code
        told = capsys.readouterr()
        *before, sentence = told.err.splitlines()  # the plan, and where seconds have passed progress
        known = all("% " in line or " image passes, about " in line for line in before)
        assert told.out == "" and sentence.startswith("error: ") and known, told
        return sentence

    return make


@pytest.mark.parametrize("words", WORDS)
def test_wrong_words(mistake, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    sentence = mistake(*words.split())
    assert re.search(WORDS[words], sentence), sentence
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("words", MEASURE)
def test_wrong_measurements(mistake, store, tmp_path, words):
    given = ("flatness", only_run(store), "--store", store, "--out", tmp_path)
    sentence = mistake(*given, *words.split())
    assert re.search(MEASURE[words], sentence), sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_absent(mistake, tmp_path):
    sentence = mistake("train", *TINY, "--device", "cuda", "--store", tmp_path)
    assert "The device 'cuda' is not available; choose auto, cpu or cuda." in sentence


def test_a_loss_that_is_not_finite_names_the_step(mistake, tmp_path):
    sentence = mistake("train", *TINY, "--lr", "1e30", "--store", tmp_path)
    assert re.search(r"loss of run \w{16} is not finite at step \d+; lower --lr\.", sentence), sentence


def test_a_corrupt_image_is_named(mistake, tmp_path):
    tree = pets(tmp_path / "pets")
    (tree / "photo" / "cat" / "3.jpg").write_bytes(b"no picture")
    sentence = mistake("train", *PETS, "--dataset", f"folder:{tree}", "--store", tmp_path / "runs")
    assert re.search(
        r"photo/cat/3\.jpg is empty or not an image of a known format .*; replace or remove it\.", sentence
    ), sentence


def test_a_class_missing_in_one_domain(mistake, tmp_path):
    tree = pets(tmp_path / "pets", skip=("photo", "dog"))
    sentence = mistake("train", *PETS, "--dataset", f"folder:{tree}", "--store", tmp_path / "runs")
    assert "Class 'dog' has no images in domain 'photo' of folder:pets" in sentence


def test_one_domain_only(mistake, tmp_path):
    tree = pets(tmp_path / "pets", domains=("sketch",))
    sentence = mistake("train", *PETS, "--dataset", f"folder:{tree}", "--store", tmp_path / "runs")
    assert "leave-one-domain-out needs at least two domains" in sentence and "only sketch" in sentence


def test_weights_that_are_no_checkpoint_or_another_network_s(mistake, tree, tmp_path):
    given = ("train", *PETS, "--dataset", f"folder:{tree}", "--store", tmp_path / "runs", "--weights")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 40)
    assert "torn.safetensors cannot be read as a checkpoint" in mistake(*given, tmp_path / "torn.safetensors")
    torch.save({"encoder.w": torch.ones(3)}, tmp_path / "alien.pth")
    assert re.search(r"alien\.pth does not fit digits-cnn", mistake(*given, tmp_path / "alien.pth"))
    assert "has no ImageNet weights" in mistake(*given, "imagenet")


def test_data_that_differ_from_the_run_s(mistake, tmp_path):
    tree, store = pets(tmp_path / "pets"), tmp_path / "runs"
    assert call("train", *PETS, "--dataset", f"folder:{tree}", "--store", store) == 0
    (tree / "paint" / "cat" / "0.png").write_bytes((tree / "paint" / "dog" / "0.png").read_bytes())
    loading_data._load.cache_clear()  # as in a new process
    sentence = mistake("flatness", only_run(store), "--radii", "0,1", "--samples", 2, "--store", store)
    assert re.search(r"The data of folder:pets differ from those that run \w{16} was trained on", sentence), sentence


def test_data_that_have_gone(mistake, tmp_path):
    tree, store = pets(tmp_path / "pets"), tmp_path / "runs"
    assert call("train", *PETS, "--dataset", f"folder:{tree}", "--store", store) == 0
    tree.rename(tmp_path / "moved")
    sentence = mistake("flatness", only_run(store), "--store", store)
    assert "Pass its location as --data-dir." in sentence
    moved = ("--data-dir", tmp_path / "moved", "--radii", "0,1", "--samples", 2, "--out", tmp_path)
    assert call("flatness", only_run(store), "--store", store, *moved) == 0


def test_runs_of_several_data_sets_in_one_measurement(mistake, store, tmp_path):
    both = tmp_path / "both"
    assert call("train", *TINY, "--store", both) == 0
    assert call("runs", "merge", "--from", store, "--store", both) == 0
    sentence = mistake("flatness", *[run.spec.digest for run in RunStore(both).runs()], "--store", both)
    assert "These runs are of several data sets (digits, folder:pets); measure those of one at a time." in sentence


def test_a_run_that_is_not_finished(mistake, tmp_path):
    assert call("train", *TINY, "--store", tmp_path) == 0
    (RunStore(tmp_path).runs()[0].path / "done").unlink()
    sentence = mistake("flatness", only_run(tmp_path), "--store", tmp_path)
    assert "is not finished, or was removed; repeat the command that started it first." in sentence


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named(mistake, tmp_path, capsys, harm):
    assert call("train", *TINY, "--store", tmp_path) == 0
    checkpoint = RunStore(tmp_path).runs()[0].checkpoint("selected")
    content = bytearray(checkpoint.read_bytes())
    content[-100] ^= 1
    checkpoint.write_bytes(content[: -50 if harm == "truncated" else None])
    measure = ("--radii", "0,1", "--samples", 2, "--out", tmp_path / "out")
    sentence = mistake("flatness", only_run(tmp_path), "--store", tmp_path, *measure)
    assert f"{checkpoint} is damaged" in sentence
    assert call("runs", "verify", "--store", tmp_path) == 1
    assert f"{checkpoint} is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only(mistake, tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", refuse)
        sentence = mistake("train", *TINY, "--store", tmp_path)
    assert os.strerror(number) in sentence and "what is finished is kept" in sentence.lower(), sentence
    assert call("train", *TINY, "--store", tmp_path) == 0  # with room again, it goes on


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_folders_that_cannot_be_made(mistake, store):
    assert re.search(r"/proc/x.*check the paths given", mistake("train", *TINY, "--store", "/proc/x"))
    given = ("flatness", only_run(store), "--radii", "0,1", "--samples", 2, "--store", store, "--out", "/proc/x")
    assert "/proc/x" in mistake(*given)


def test_reproduce_where_the_analyses_are_not(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "find_spec", lambda name: None)
    for given in (("reproduce", "fig3"), ("list",)):
        assert "needs analyses/, which is in flatlab's repository and not in its wheel" in mistake(*given)


def test_tensorboard_where_it_is_not_installed(mistake, tmp_path, monkeypatch):
    from flatlab.report import tensorboard

    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    sentence = mistake("train", *TINY, "--tensorboard", tmp_path, "--store", tmp_path / "runs")
    assert "pip install 'flatlab[tensorboard]'" in sentence and not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(UserError, match="Unknown method"):
        call("train", "--method", "nix", "--debug")
    with pytest.raises(UserError, match="No run in"):
        call("runs", "show", "beef", "--store", tmp_path, "--debug")


def test_a_bug_is_reported_as_a_bug(mistake, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError("momentum")

    monkeypatch.setattr(RunStore, "folders", fail)
    sentence = mistake("runs", "list", "--store", tmp_path, code=1)
    assert "KeyError: 'momentum': a bug in flatlab" in sentence and "--debug" in sentence
    with pytest.raises(KeyError):
        call("runs", "list", "--store", tmp_path, "--debug")


def test_a_bug_in_a_worker_is_reported_as_a_bug(mistake, tmp_path, monkeypatch):
    from flatlab.train import loop

    def fail(*_, **__):
        raise KeyError("momentum")

    monkeypatch.setattr(loop, "train", fail)
    sentence = mistake("train", *TINY, "--store", tmp_path, code=1)
    assert "(a bug in flatlab)" in sentence and "--debug" in sentence


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SMOKE.replace(bits=17), "Setting: bits must be at most 16, got 17."),
        (lambda: SMOKE.replace(lr=0.0), "Setting: lr must be greater than 0.0, got 0.0."),
        (lambda: SMOKE.replace(stepps=3), "Setting has no field 'stepps'; its fields are "),
        (lambda: SphereSpec.make(radii=(0.0,), space="flat"), "space must be 'baked', 'latent' or 'codes', got "),
        (lambda: RunSpec.make(dataset="digits"), "RunSpec: the field 'held_out' is missing."),
        (lambda: SMOKE.replace(steps="ten"), "Setting: steps must be a valid integer, got 'ten'."),
    ],
)
def test_a_library_s_user_reads_sentences_too(make, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        make()
