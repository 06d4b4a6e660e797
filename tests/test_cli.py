"""The commands as a user gives them: what they print, where, and what they leave on disk."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
from commandline import PETS, TINY, Answer, call, documented, only_run, pets
from pydantic import Field

from flatlab.cli import app, options, overview
from flatlab.errors import UserError
from flatlab.models import networks
from flatlab.specs import settings
from flatlab.specs.base import Spec
from flatlab.store.runs import RunStore

COMMANDS = ["reproduce", "train", "flatness", "noise", "hessian", "landscape", "audit", "selftest", "stability"]
COMMANDS += ["replay", "ensemble", "import", "methods", "list", "doctor", "report", "export", "latency"]
COMMANDS += ["runs list", "runs show", "runs verify", "runs rm", "runs merge", "data list", "data check", "data cache"]
COMMANDS += ["jobs list", "jobs logs", "jobs cancel"]
GROUPS = ("runs", "data", "jobs")
HEAVY = ("torch", "pandas", "matplotlib", "numpy", "typer", "rich", "pydantic")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with an ERM run and a run of a composition."""
    root = tmp_path_factory.mktemp("cli") / "runs"
    assert call("train", *TINY, "--store", root) == 0
    composed = ("--method", "sam", "--average", "swad", "--quantizer", "lsq", "--bits", "4")
    assert call("train", *TINY, *composed, "--store", root) == 0
    return root


@pytest.fixture
def flatlab(capsys):
    def ask(*given: object) -> Answer:
        capsys.readouterr()
        code = call(*given)
        return Answer(code, *capsys.readouterr())

    return ask


def digests(store: Path) -> dict[str, str]:
    return {run.spec.label: run.spec.digest for run in RunStore(store).runs()}


def test_help_loads_nothing_heavy():
    script = f"import sys; sys.argv = ['flatlab', '--help']\nfrom flatlab.cli import main\ntry: main()\nfinally: \
print([name for name in {HEAVY} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.endswith("[]\n") and "Begin with `flatlab reproduce fig3`" in told


def test_the_overview_names_each_command_with_the_first_sentence_of_its_help(flatlab, monkeypatch):
    told = {name: text for names in overview.COMMANDS.values() for name, text in names.items()}
    group = app.typer.main.get_command(app.app)
    assert told == {name: " ".join(command.help.split("\n\n")[0].split()) for name, command in group.commands.items()}
    options = {param.opts[0]: param.help for param in group.get_params(app.typer.Context(group))}
    assert options == {words.split(", ")[-1]: text for words, text in overview.OPTIONS.items()}
    for columns in (1, 40, 80, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        page = flatlab("-h").out
        assert page == flatlab().out == flatlab("--version", "--help").out
        longest = max(map(len, page.splitlines()))
        assert longest <= max(overview.NARROWEST, min(columns, overview.WIDEST))
        assert all(re.search(rf"^  {name} +\S", page, re.MULTILINE) for name in told)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_says_what_and_shows_an_example(flatlab, command):
    answer = flatlab(*command.split(), "--help")
    plain = re.sub(r"\s+", " ", answer.out)
    assert answer.code == 0 and f"flatlab {command}" in plain.split("Example")[1], plain


def test_the_bare_word_shows_the_help(flatlab):
    for given in ([], ["runs"], ["data"]):
        answer = flatlab(*given)
        assert (answer.code, answer.err) == (0, "") and "Usage: flatlab" in answer.out


def test_help_says_nothing_if_the_reader_has_closed_the_pipe():
    with subprocess.Popen([sys.executable, "-m", "flatlab"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_help_on_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        answer = subprocess.run([sys.executable, "-m", "flatlab"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert answer.returncode == 2 and re.fullmatch("error: .*No space left on device.*\n", answer.stderr)


def test_version(flatlab):
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", flatlab("--version").out)


def test_one_word_means_one_thing():
    group = app.typer.main.get_command(app.app)
    named = {name: command for name, command in group.commands.items() if name not in GROUPS}
    named |= {f"{each} {name}": c for each in GROUPS for name, c in group.commands[each].commands.items()}
    assert set(named) == set(COMMANDS)
    shared = {}
    for command in named.values():
        for param in command.params:
            if param.name in options.WORDS and param.opts[0].startswith("--"):
                shared.setdefault(param.name, set()).add((param.help, tuple(param.opts)))
    assert set(shared) == set(options.WORDS)  # each is used somewhere, and is the same wherever it is used
    several = {name for name, meanings in shared.items() if len(meanings) > 1}
    # Of training, how inputs of layers are quantized; of export, how they are stored. What is corrupted: the held-out
    # domain of a run, or the images of a measurement.
    assert several == {"activations", "corruption", *options.SELECTING}
    for name, command in named.items():
        helps = {param.name: param.help for param in command.params}
        if {"held_out", "seed"} <= set(helps):
            selects = [helps[each].startswith("Select the runs") for each in ("held_out", "seed")]
            assert selects == 2 * ["method" not in helps and "dataset" not in helps], name


def test_help_names_the_bounds_choices_and_defaults_of_the_fields():
    told = {name: each.metadata["option"].help for name, each in options.WORDS.items()}
    assert told["bits"] == "Bits of a quantized weight. [>= 2, <= 16] (default: 7)"
    assert told["steps"].endswith("[>= 1] (default: smoke 10, quick 300, paper 5000)")
    assert told["lr"].endswith("[> 0] (default: smoke 0.003, quick 0.001, paper 5e-05)")
    assert told["image_size"].endswith("(default: 16 for digits, 224 for photographs, 48 for sentences)")
    assert "[none, signed, unsigned] (default: none)" in told["activations"] and "erm, coral" in told["objective"]
    assert set(options.MODELS) == set(networks.MODELS)
    quick, paper = settings.QUICK, settings.PAPER
    assert (quick.rises[0], quick.beyond, paper.radii) == (0.02, 1.0, tuple(range(0, 61, 5)))  # of `flatness --radii`


def test_bounds_and_names_are_those_of_the_field():
    class Fictitious(Spec):
        rate: float = Field(0.5, gt=0, le=1, description="Rate.")
        kind: Literal["one", "other"] = Field("one", description="Kind.")

    rate, kind = (options.Rule.of(Fictitious.model_fields[name]) for name in ("rate", "kind"))
    assert rate.help("Rate.") == "Rate. [> 0, <= 1]" and kind.help("Kind.") == "Kind. [one, other]"
    assert (rate.checked("rate", 1.0), rate.checked("rate", None), kind.checked("kind", "Other")) == (
        1.0,
        None,
        "other",
    )
    for value, bound in ((0.0, "> 0"), (1.5, "<= 1"), (float("nan"), "> 0")):
        with pytest.raises(UserError, match=f"--rate must be a number {bound}, got {value}"):
            rate.checked("rate", value)
    with pytest.raises(UserError, match=r"Unknown kind 'on'; did you mean one\?"):
        kind.checked("kind", "on")


def test_train_prints_a_table_and_json_alone_on_stdout(flatlab, store):
    table = flatlab("train", *TINY, "--store", store)
    assert table.code == 0 and "training-domain" in table.out
    rows = documented("train", flatlab("train", *TINY, "--json", "--store", store).out)
    assert [row["selection"] for row in rows] == ["training-domain", "oracle", "last"]
    assert {row["held_out"] for row in rows} == {"rot0"}


def test_a_composition_is_trained_as_asked(store):
    (run,) = [run for run in RunStore(store).runs() if run.spec.label == "sam-lsq-swad"]
    assert (run.spec.step.kind, run.spec.average.kind, run.spec.quantizer.bits) == ("sam", "swad", 4)


def test_the_store_is_also_an_environment_variable(flatlab, store, monkeypatch):
    monkeypatch.setenv("FLATLAB_STORE", str(store))
    assert len(documented("runs list", flatlab("runs", "list", "--json").out)) == 2


@pytest.mark.parametrize("held_out", ["rot45", "3"])
def test_dry_run_begins_nothing(flatlab, tmp_path, held_out):
    given = ("train", "--held-out", held_out, "--method", "qt-dog", "--dry-run", "--store", tmp_path / "new")
    assert "1 job, " in flatlab(*given).out
    plan = documented("--dry-run", flatlab(*given, "--json").out)
    assert [job["name"] for job in plan["jobs"]] == ["train lsq on rot45, seed 0"] and plan["workers"] == 1
    assert not (tmp_path / "new").exists()


def test_flatness_of_several_runs(flatlab, store, tmp_path):
    runs = digests(store).values()
    given = ("flatness", *runs, "--radii", "0:3:1", "--samples", 4, "--images", 20, "--store", store, "--out", tmp_path)
    answer = flatlab(*given, "--domains", "target", "--normalisation", "filter")
    assert answer.code == 0 and "held-out domain" in answer.out and "flatness.csv" in answer.err
    latent = flatlab(*given, "--space", "latent", "--params", "features.0*", "--json")
    assert latent.code == 0, latent.err
    rows = pd.DataFrame(documented("flatness", latent.out))
    assert rows.groupby("method")["radius"].apply(list).tolist() == [[0, 1, 2, 3]] * 2
    assert (rows["l2"] == rows["radius"]).all() and (rows["low"] <= rows["value"]).all()
    assert {path.suffix for path in tmp_path.glob("flatness.*")} == {".csv", ".pdf", ".png"}
    assert pd.read_csv(tmp_path / "flatness.csv")["value"].tolist() == pytest.approx(rows["value"].tolist())


def test_an_accuracy_is_planned_by_a_pilot_whose_plan_is_kept(flatlab, store, tmp_path):
    digest = digests(store)["erm"]
    given = ("flatness", digest, "--radii", "1,4", "--rel-error", 0.3, "--store", store, "--out", tmp_path)
    rows = pd.DataFrame(documented("flatness --dry-run", flatlab(*given, "--dry-run", "--json").out))
    assert rows["radius"].tolist() == [1, 4] and (rows["images"] >= rows["visits"] * rows["block_size"]).all()
    assert (rows["core_seconds"] > 0).all()
    (measurement,) = (each for each in RunStore(store).find(digest).measurements() if not each.done)
    (plan,) = measurement.path.glob("unit-plan*")
    before = plan.read_bytes()
    answer = flatlab(*given)
    assert (
        answer.code == 0
        and measurement.done
        and plan.read_bytes() == before
        and "Sampling plans of the pilots" not in answer.out
    )


@pytest.mark.slow
def test_flatness_says_which_is_flatter(flatlab, store, tmp_path):
    a, b = digests(store).values()
    given = ("--radii", "1,4", "--images", 20, "--store", store, "--out", tmp_path)
    for effort in (("--samples", 4), ("--block-size", 8, "--rel-error", 0.3), ("--rel-error", 0.3)):
        told = flatlab("flatness", a, b, *given, *effort).err
        (sentence,) = [line for line in told.splitlines() if "flatter" in line or "distinguishable" in line]
        assert sentence.endswith(".") and ("radius" in sentence or "all radii" in sentence)


def test_runs_are_listed_shown_verified_merged_and_removed(flatlab, store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other processes may have left something in the usual one
    digest = digests(store)["erm"]
    assert digest[:8] in flatlab("runs", "list", "--store", store).out
    shown = documented("runs show", flatlab("runs", "show", digest[:6], "--store", store).out)
    assert shown["spec"]["held_out"] == "rot0" and shown["log"][-1]["step"] == 10
    assert documented("runs verify", flatlab("runs", "verify", "--store", store, "--json").out)["faults"] == []
    copy = tmp_path / "copy"
    assert (
        documented("runs merge", flatlab("runs", "merge", "--from", store, "--store", copy, "--json").out)["runs"] == 2
    )
    again = flatlab("runs", "merge", "--from", store, "--store", copy).out
    assert again.startswith("0 runs, 0 measurements, 0 kept checkpoints, ") and again.endswith("0 differ here.\n")
    assert " here already, " in again
    assert "given twice" in flatlab("runs", "rm", digest, digest, "--store", copy).err
    assert documented("runs rm", flatlab("runs", "rm", digest, "--store", copy, "--json").out)["removed"]
    assert only_run(copy) == digests(store)["sam-lsq-swad"]


def test_an_empty_store_is_said_to_be_empty(flatlab, tmp_path):
    assert "No runs in" in flatlab("runs", "list", "--store", tmp_path / "none").out
    assert flatlab("runs", "list", "--store", tmp_path / "none", "--json").out == "[]\n"


def test_the_tables_of_what_is_known(flatlab, store):
    assert "release-parity" in flatlab("methods").out
    notes = {row["method"]: row["note"] for row in documented("methods", flatlab("methods", "--json").out)}
    sources = {"SAGM": "Wang et al. 2023", "SAQ": "Liu et al. 2021", "GAQAT": "2412.05551", "FQAT": "2509.00859"}
    assert all(source in notes[name] for name, source in sources.items())
    data = documented("data list", flatlab("data", "list", "--json").out)
    assert {row["name"] for row in data} >= {"digits", "PACS"}
    assert documented("doctor", flatlab("doctor", "--device", "cpu", "--json").out)["device"] == "cpu"
    figures = documented("list", flatlab("list", *TINY, "--store", store, "--json").out)
    (row,) = [each for each in figures if each["name"] == "fig3"]
    assert row["missing"].endswith(" to measure")


def test_a_folder_of_ones_own(flatlab, tmp_path):
    tree, store = pets(tmp_path / "pets"), tmp_path / "runs"
    rows = documented("data check", flatlab("data", "check", f"folder:{tree}", "--json").out)
    assert [(row["domain"], row["classes"], row["images"]) for row in rows] == [
        ("paint", 2, 20),
        ("photo", 2, 20),
        ("sketch", 2, 20),
    ]
    answer = flatlab("train", *PETS, "--dataset", f"folder:{tree}", "--store", store)
    assert answer.code == 0, answer.err
    spec = RunStore(store).runs()[0].spec
    assert (spec.dataset, spec.weights, spec.freeze_batchnorm, spec.lr) == ("folder:pets", "none", False, 3e-3)
    measure = ("flatness", spec.digest, "--radii", "0,1", "--samples", 2, "--store", store, "--out", tmp_path)
    assert flatlab(*measure).code == 0  # the folder is remembered


def test_what_suits_the_data():
    quick, paper, suit = settings.QUICK, settings.PAPER, settings.for_data
    assert suit(quick, "digits") == quick and suit(paper, "PACS") == paper
    photos = suit(quick, "VLCS")
    assert (photos.model, photos.weights, photos.freeze_batchnorm, photos.lr) == ("resnet50", "imagenet", True, 5e-5)
    assert (photos.steps, photos.radii) == (quick.steps, None)  # the paper's are of its own network on PACS
    for scratch in (suit(quick, "VLCS", weights="none"), suit(quick, "VLCS", model="digits-cnn")):
        assert (scratch.weights, scratch.freeze_batchnorm, scratch.lr) == ("none", False, quick.lr)
    digits = suit(paper, "digits")
    assert (digits.model, digits.freeze_batchnorm, digits.lr, digits.steps) == ("digits-cnn", False, quick.lr, 5000)
    for text in (suit(paper, "sentences"), suit(paper, "folder-text:mine")):
        assert (text.model, text.image_size, text.weights, text.lr) == ("sentences-transformer", 48, "none", quick.lr)


def test_tensorboard_events(flatlab, store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    given = ("train", *TINY, "--store", store, "--tensorboard", tmp_path)
    assert flatlab(*given).code == 0 and flatlab(*given).code == 0  # written anew, not doubled
    (file,) = tmp_path.glob("erm-rot0-seed0-*/events.out.tfevents.*")
    tags = {(value.tag, event.step) for event in EventFileLoader(str(file)).Load() for value in event.summary.value}
    assert {("validation", 0), ("source/rot15/accuracy", 3), ("train_loss", 10)} <= tags


def test_the_numbers_of_a_log_by_name():
    from flatlab.report.tensorboard import scalars

    row = {"step": 3, "validation": 0.5, "target": {"in": {"loss": 2, "n": 9}}, "note": None}
    assert dict(scalars(row)) == {"validation": 0.5, "target/in/loss": 2.0, "target/in/n": 9.0}


@pytest.mark.slow
def test_interrupted_it_says_how_to_go_on_and_goes_on(tmp_path):
    """Real workers: an interrupt reaches the command's whole process group."""
    store = tmp_path / "runs"
    command = [sys.executable, "-m", "flatlab", "train", *TINY, "--workers", "1", "--store", str(store)]
    command += ["--steps", "200", "--eval-every", "10"]
    quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
    pipe = subprocess.PIPE
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child of what ignores it would ignore it too
    running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True, env=quiet)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 180
    while not list(store.glob("*/state/resume.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, ""), err
    assert err.endswith("Stopped. Finished work is kept: repeat the command to continue.\n")
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, env=quiet)
    assert json.loads(again.stdout)[-1]["step"] == 200
    sessions = RunStore(store).runs()[0].provenance["sessions"]
    assert sessions[-1]["from_step"] > 0
