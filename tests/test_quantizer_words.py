"""Quantizers, noise and step rules in words of `flatlab train`: the runs that they name, and what makes no sense."""

import re

import pytest
from commandline import TINY, call

from flatlab.specs.methods import METHODS, replicates
from flatlab.specs.quantizers import BothSpec, INQSpec, NoiseSpec, OBCSpec, QuantSpec, RTNSpec
from flatlab.specs.run import FREEZING, FreezeSpec, StepSpec
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore

LSQ = {"scale_lr": SMOKE.scale_lr}

NAMED = {  # what the user writes -> the quantizer, or the noise, of the run
    "--method qt-dog": QuantSpec(**LSQ),
    "--method qt-dog --granularity tensor --bits 4": QuantSpec(granularity="tensor", bits=4, **LSQ),
    "--method qt-dog --log-scale": QuantSpec(log_scale=True, **LSQ),
    "--method qt-dog --unsigned": QuantSpec(signed=False, **LSQ),
    "--method qt-dog --skip-first --head": QuantSpec(skip_first=True, head=True, **LSQ),
    "--method qt-dog --activations unsigned": QuantSpec(activations="unsigned", **LSQ),
    "--method qt-dog --activations Signed --activation-bits 4": QuantSpec(
        activations="signed", activation_bits=4, **LSQ
    ),
    "--quantizer inq --inq-grid power-of-two --bits 5": INQSpec(every=1, grid="power-of-two", bits=5),
    "--quantizer inq --granularity tensor": INQSpec(every=1, granularity="tensor"),
    "--quantizer rtn --granularity tensor": RTNSpec(granularity="tensor"),
    "--quantizer obc --granularity tensor --bits 3": OBCSpec(granularity="tensor", bits=3),
    "--method noise --noise-amplitude 0.01": NoiseSpec(amplitude=0.01),
    "--method noise-kept --noise-amplitude 1e-4": NoiseSpec(amplitude=1e-4, persistent=True),
    "--method noise --granularity tensor --bits 4": NoiseSpec(granularity="tensor", bits=4),
    "--method lsq": BothSpec(scale_lr=SMOKE.lr),
    "--method gaqat --qat-bits 3 --granularity tensor": BothSpec(
        bits=3, activation_bits=3, granularity="tensor", scale_lr=SMOKE.lr
    ),
}

STEPS = {  # what the user writes -> the step rule of the run
    "--method sagm": StepSpec(kind="sagm"),
    "--step sagm --sagm-alpha 0.002 --sam-rho 0.1": StepSpec(kind="sagm", rho=0.1, alpha=0.002),
    "--method saq": StepSpec(kind="saq"),
    "--step saq --quantizer inq": StepSpec(kind="saq"),
    "--method gaqat": StepSpec(kind="gaqat", freezing=FreezeSpec(every=1)),
    "--method gaqat --perturb all --freeze-every 3 --freeze-threshold 0.2": StepSpec(
        kind="gaqat", perturb="all", freezing=FreezeSpec(every=3, threshold=0.2)
    ),
    "--method gaqat --freeze-trigger between --freeze-gradient smooth --freeze-unit Channel": StepSpec(
        kind="gaqat", freezing=FreezeSpec(every=1, trigger="between", gradient="smooth", unit="channel")
    ),
    "--method gaqat --freeze-forever --freeze-rescale": StepSpec(
        kind="gaqat", freezing=FreezeSpec(every=1, forever=True, rescale=True)
    ),
    "--method gaqat --freeze-alternate": StepSpec(kind="gaqat", freezing=FreezeSpec(every=1, alternate=True)),
    "--method fqat --freeze-what layer --freeze-top 0.5": StepSpec(
        kind="fqat", freezing=FreezeSpec(every=1, **FREEZING["fqat"], top=0.5, what="layer")
    ),
    "--step fqat --quantizer lsq --freeze-direction low --freeze-when window": StepSpec(
        kind="fqat", freezing=FreezeSpec(every=1, **{**FREEZING["fqat"], "direction": "low", "when": "window"})
    ),
}

LEFT_OUT = r", or leave it out\."
IDLE = {  # what makes no sense -> what is said
    "--inq-grid uniform": r"--inq-grid uniform does nothing without INQ; add --quantizer inq" + LEFT_OUT,
    "--method qt-dog --inq-grid power-of-two": r"--inq-grid power-of-two does nothing without INQ",
    "--quantizer inq --inq-grid pow2": r"Unknown inq-grid 'pow2'.*: uniform, power-of-two\.",
    "--quantizer inq --inq-grid power-of-two --bits 9": r"A grid of powers of two must have 2 to 8 bits, got 9\.",
    "--granularity tensor": r"--granularity tensor does nothing without a quantizer; add --quantizer lsq" + LEFT_OUT,
    "--method qt-dog --granularity row": r"Unknown granularity 'row'.*: channel, tensor\.",
    "--quantizer obc --log-scale": r"--log-scale does nothing without LSQ; add --quantizer lsq" + LEFT_OUT,
    "--quantizer rtn --unsigned": r"--unsigned does nothing without LSQ; add --quantizer lsq" + LEFT_OUT,
    "--quantizer inq --activations signed": r"--activations signed does nothing without LSQ; add --quantizer lsq",
    "--method qt-dog --activations relu": r"Unknown activations 'relu'.*: none, signed, unsigned\.",
    "--method qt-dog --activation-bits 4": (
        r"--activation-bits 4 does nothing without quantized activations; add --activations unsigned \(or signed\)"
    ),
    "--method qt-dog --activations unsigned --activation-bits 1": (r"--activation-bits .*>= 2.* 1\."),
    "--method qt-dog --noise-amplitude 1": (
        r"--noise-amplitude 1\.0 does nothing without noise on the weights; use --method noise" + LEFT_OUT
    ),
    "--method noise --noise-amplitude -1": r"--noise-amplitude .*>= 0.* -1\.0",
    "--method noise --noise-amplitude 0.1 --bits 4": (
        r"--noise-amplitude sets the size of the noise; leave --bits and --granularity out\."
    ),
    "--quantize-at 0": r"--quantize-at 0 does nothing without a quantizer that trains; add --quantizer lsq",
    "--method sam --sagm-alpha 0.1": r"--sagm-alpha 0\.1 does nothing without SAGM; add --step sagm" + LEFT_OUT,
    "--method sagm --sagm-alpha -1": r"--sagm-alpha .*>= 0.* -1\.0",
    "--perturb all": r"--perturb all does nothing without SAM; add --step sam" + LEFT_OUT,
    "--method qt-dog --qat-bits 3": r"--qat-bits 3 does nothing without the quantizer lsq-both; add --quantizer lsq-bo",
    "--method gaqat --bits 3": r"--bits is of weights alone, .*; write --qat-bits 3\.",
    "--method sagm --freeze-forever": r"--freeze-forever does nothing without GAQAT or FQAT; use --method gaqat",
    "--method gaqat --freeze-every 0": r"--freeze-every must be an integer >= 1, got 0\.",
    "--method gaqat --freeze-every 301": r"--freeze-every must be at most the 300 steps, got 301: no step would follow",
    "--method fqat --freeze-when window --freeze-every 5 --steps 9 --quantize-at 5": (
        r"--freeze-every must be at most the 4 steps after the switch, got 5: no step would follow the first window"
    ),
    "--method saq --perturb all": r"--perturb all adds to SAQ the step sizes of inputs, .*; add --activations unsigned",
    "--method gaqat --freeze-top 2": r"--freeze-top must be a number <= 1, got 2\.0\.",
    "--method gaqat --freeze-trigger both": r"Unknown freeze-trigger 'both'.*: task, smooth, between\.",
    "--method gaqat --freeze-what weights": r"Freezing weights needs the unit layer, got scale: write --freeze-unit l",
    "--step saq": r"The step rule saq needs a quantizer in training; add --quantizer lsq, or choose --step sam\.",
    "--step gaqat --quantizer inq": r"The step rule gaqat needs learned step sizes, got the quantizer inq; add --quan",
}


@pytest.fixture
def asked(monkeypatch):
    """The runs that a dry run would train."""
    found = []
    monkeypatch.setattr("flatlab.cli.run_jobs.price", lambda _, todo, __: found.extend(todo[-1].runs))
    return found


@pytest.mark.parametrize("words", NAMED)
def test_words_name_a_quantizer(words, asked, tmp_path):
    assert call("train", *words.split(), *TINY, "--steps", 9, "--dry-run", "--store", tmp_path) == 0
    (spec,) = asked
    assert (spec.quantizer or spec.noise) == NAMED[words]


@pytest.mark.parametrize("words", STEPS)
def test_words_name_a_step_rule(words, asked, tmp_path):
    assert call("train", *words.split(), *TINY, "--steps", 9, "--dry-run", "--store", tmp_path) == 0
    (spec,) = asked
    assert spec.step == STEPS[words]


def test_a_composition_of_words_trains(tmp_path):
    words = "--quantizer inq --inq-grid power-of-two --granularity tensor --bits 4"
    assert call("train", *words.split(), *TINY, "--steps", 9, "--store", tmp_path) == 0
    (run,) = [run for run in RunStore(tmp_path).runs() if run.done and run.spec.quantizer]
    assert run.spec.quantizer == INQSpec(every=1, grid="power-of-two", granularity="tensor", bits=4)


def test_words_at_their_defaults_change_no_name(asked, tmp_path):
    words = ("--granularity", "channel", "--activations", "none")
    assert call("train", "--method", "qt-dog", *words, *TINY, "--dry-run", "--store", tmp_path) == 0
    assert asked == replicates(METHODS["QT-DoG"], SMOKE.replace(held_out=("rot0",), seeds=1))


def test_a_setting_writes_a_quantizers_options_where_they_are_unusual_alone():
    usual = SMOKE.model_dump()
    assert "inq_grid" not in usual and "noise_amplitude" not in usual
    assert SMOKE.replace(inq_grid="power-of-two").model_dump() == {**usual, "inq_grid": "power-of-two"}


@pytest.mark.parametrize("words", IDLE)
def test_what_makes_no_sense_is_one_sentence(words, tmp_path, capsys):
    assert call("train", *words.split(), "--held-out", "rot0", "--dry-run", "--store", tmp_path) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: {IDLE[words]}", said) and said.count("\n") == 1, said
