"""Quantizers and noise in the words of `flatlab train`: the runs that they name, and what makes no sense."""

import re

import pytest
from commandline import TINY, call

from flatlab.specs.methods import METHODS, replicates
from flatlab.specs.quantizers import INQSpec, NoiseSpec, OBCSpec, QuantSpec, RTNSpec
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore

LSQ = {"scale_lr": SMOKE.scale_lr}

NAMED = {  # what the user writes -> the quantizer, or the noise, of the run
    "--method qt-dog": QuantSpec(**LSQ),
    "--method qt-dog --granularity tensor --bits 4": QuantSpec(granularity="tensor", bits=4, **LSQ),
    "--method qt-dog --log-scale": QuantSpec(log_scale=True, **LSQ),
    "--method qt-dog --unsigned": QuantSpec(signed=False, **LSQ),
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
    "--method noise --noise-amplitude 0": r"--noise-amplitude .*> 0.* 0\.0",
    "--method noise --noise-amplitude 0.1 --bits 4": (
        r"--noise-amplitude sets the size of the noise; leave --bits and --granularity out\."
    ),
    "--quantize-at 0": r"--quantize-at 0 does nothing without a quantizer that trains; add --quantizer lsq",
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
