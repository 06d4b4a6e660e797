"""Codes as bits, and quantized runs as files: the round trip is exact, and the bytes are told as they are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import call, documented
from stores import PLACE, TINY, flip, refuses, spec, trained

from flatlab import files
from flatlab.loading import checkpoint
from flatlab.loading.export import export, load_exported
from flatlab.models.networks import Ensemble
from flatlab.quant.attach import bake
from flatlab.quant.packing import bits_of, pack, unpack
from flatlab.specs.methods import METHODS, compose
from flatlab.store.runs import RunStore
from flatlab.train.derived import join
from flatlab.train.imported import import_checkpoint

# --- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1001])
def test_codes_come_back_and_take_their_bits(bits, count):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = np.random.default_rng(bits).integers(low, high, size=count, endpoint=True, dtype=np.int32)
    codes[:2] = (low, high)[:count]
    stream = pack(codes, low, bits)
    assert stream.dtype == np.uint8 and stream.size == -(-count * bits // 8)
    assert unpack(stream, count, low, bits).tolist() == codes.tolist()


def test_bits_lie_one_after_the_other_from_the_least():
    assert pack(np.array([1, 0, 2, 3]), 0, 3).tolist() == [0b10000001, 0b00000110]  # 001 000 010 011, read backwards
    assert (bits_of(-64, 63), bits_of(-63, 63), bits_of(0, 255), bits_of(-1, 1)) == (7, 7, 8, 2)


def test_many_codes_are_packed_in_parts(monkeypatch):
    codes = np.random.default_rng(0).integers(-4, 4, size=1003)
    whole = pack(codes, -4, 3)
    monkeypatch.setattr("flatlab.quant.packing.AT_ONCE", 64)
    assert pack(codes, -4, 3).tolist() == whole.tolist()
    assert unpack(whole, 1003, -4, 3).tolist() == codes.tolist()


# --- runs ----------------------------------------------------------------------------------------------------------


def quantized(method="QT-DoG", **fields):
    run = compose(METHODS[method], TINY, held_out="rot45", seed=0, trial_seed=0)
    return run.replace(quantizer=run.quantizer.replace(**fields))


RUNS = {
    "2 bits": quantized(bits=2),
    "7 bits, tensor": quantized(granularity="tensor"),
    "8 bits": quantized(bits=8),
    "16 bits": quantized(bits=16),
    "unsigned logarithmic": quantized(bits=5, signed=False, log_scale=True),
    "activations": quantized(bits=4, activations="unsigned", activation_bits=6),
    "both": quantized("LSQ"),
    "both, with freezing": quantized("GAQAT", bits=3, activation_bits=3, granularity="tensor"),
    "inq": quantized("INQ", bits=5),
    "powers of two": quantized("INQ", bits=4, grid="power-of-two"),
    "obc": quantized("OBC", bits=3, exact_columns=0, images=60),
    "rtn": quantized("RTN"),
}


@pytest.mark.parametrize("wanted", RUNS.values(), ids=RUNS)
def test_an_exported_run_loads_back_to_the_baked_network_to_the_bit(tmp_path, wanted):
    store = trained(tmp_path, *[wanted.parent] * wanted.derived)
    run = trained(store.root, wanted).run(wanted)
    told = export(run, tmp_path / "file.safetensors", PLACE)
    loaded, expected = load_exported(tmp_path / "file.safetensors"), checkpoint.network(run, "selected", PLACE)
    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    logits = expected(images)
    bake(expected)
    state = expected.state_dict()
    assert list(loaded.state_dict()) == list(state) and not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype == state[name].dtype
        assert value.contiguous().numpy().tobytes() == state[name].contiguous().numpy().tobytes(), name
    assert torch.equal(loaded(images), logits)
    bits = wanted.quantizer.bits
    assert (told.bits, told.nominal) == (bits, 32 / bits)
    assert told.bytes == (tmp_path / "file.safetensors").stat().st_size
    first = wanted.quantizer.kind != "lsq-both"  # whether the first layer's weight is quantized
    count = first * 16 * 9 + 32 * 16 * 9 + 64 * 32 * 9
    inputs = getattr(wanted.quantizer, "activations", "none") != "none"
    assert told.quantized_share == pytest.approx(count / (33658 + 3 * inputs))
    assert told.float_bytes == pytest.approx(4 * 33658, rel=0.01)
    rest = 4 * (33658 - count) + 4 * (1 if wanted.quantizer.granularity == "tensor" else 96 + 16 * first)
    assert 0 < told.bytes - rest - count * bits / 8 < 5000  # the header's names, BatchNorm's statistics
    assert told.compression < told.nominal


def logits(network):
    return network(torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)))


MEMBERS = (quantized(), quantized(bits=4), spec())  # one stays in float


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_an_exported_ensemble_answers_to_the_bit_and_packs_its_members(tmp_path, combine):
    joint = spec().replace(members=MEMBERS, combine=combine)
    for each in MEMBERS:
        trained(tmp_path, each)
    store = RunStore(tmp_path)
    join(joint, store, PLACE)
    told = export(store.run(joint), tmp_path / "file.safetensors", PLACE)
    loaded = load_exported(tmp_path / "file.safetensors")
    assert isinstance(loaded, Ensemble) and loaded.combine == combine and not loaded.training
    assert torch.equal(logits(loaded), logits(checkpoint.network(store.run(joint), "selected", PLACE)))
    alone = [export(store.run(each), tmp_path / f"{each.digest}.safetensors", PLACE) for each in MEMBERS[:2]]
    assert told.float_bytes == 3 * alone[0].float_bytes and told.bits == 7
    assert told.quantized_share == pytest.approx(2 / 3 * alone[0].quantized_share)
    rest = told.bytes - sum(each.bytes for each in alone) - alone[0].float_bytes
    assert abs(rest) < 3000  # the headers' names


IMPORTED = ["7 bits, tensor", "inq", "obc", "16 bits"]


@pytest.mark.parametrize("name", IMPORTED)
def test_an_exported_file_comes_in_as_the_same_network_and_goes_out_as_the_same_bytes(tmp_path, name):
    wanted = RUNS[name]
    store = trained(tmp_path, *[wanted.parent] * wanted.derived)
    run = trained(store.root, wanted).run(wanted)
    export(run, tmp_path / "out.safetensors", PLACE)
    setting = TINY.replace(held_out=("rot45",), model="resnet18")  # the file knows its model
    again = RunStore(tmp_path / "again")
    imported = again.run(import_checkpoint(tmp_path / "out.safetensors", setting, again, PLACE))
    assert imported.spec.quantizer.bits == wanted.quantizer.bits and imported.spec.model == "digits-cnn"
    mine, theirs = (checkpoint.network(each, "selected", PLACE) for each in (imported, run))
    assert torch.equal(logits(mine), logits(theirs))
    own = next(row for row in run.rows() if row["step"] == files.load_arrays(run.checkpoint("selected"))[1]["step"])
    assert imported.rows()[0]["target"] == own["target"]
    export(imported, tmp_path / "again.safetensors", PLACE)
    if name != "inq":  # whose codes begin one higher, as no signed grid does
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert torch.equal(logits(load_exported(tmp_path / "again.safetensors")), logits(theirs))


def test_codes_on_another_grid_come_in_as_floats(tmp_path):
    run = trained(tmp_path, RUNS["powers of two"]).run(RUNS["powers of two"])
    export(run, tmp_path / "out.safetensors", PLACE)
    again = RunStore(tmp_path / "again")
    setting = TINY.replace(held_out=("rot45",))
    imported = again.run(import_checkpoint(tmp_path / "out.safetensors", setting, again, PLACE))
    assert imported.spec.quantizer is None
    mine, theirs = (checkpoint.network(each, "selected", PLACE) for each in (imported, run))
    assert torch.equal(logits(mine), logits(theirs))


def test_exported_files_make_an_ensemble_that_is_measured_and_exported(store, tmp_path, capsys):
    """Through the command line: two exported files, their ensemble, its export."""
    ours, words = tmp_path / "runs", ("--store", tmp_path / "runs", "--json")
    trained(store.root, quantized(bits=4))
    digests = []
    for wanted in (quantized(), quantized(bits=4)):
        file = tmp_path / f"{wanted.quantizer.bits}.safetensors"
        export(store.run(wanted), file, PLACE)
        assert call("import", file, "--held-out", "rot45", *words) == 0
        digests.append(json.loads(capsys.readouterr().out)[0]["run"])
    assert call("ensemble", *digests, "--combine", "probabilities", "--workers", "1", *words) == 0
    (row,) = json.loads(capsys.readouterr().out)
    joint = RunStore(ours).find(row["run"])
    assert joint.spec.combine == "probabilities" and joint.done and row["method"] == "2 x imported"
    joint_logits = logits(checkpoint.network(joint, "selected", PLACE))
    each = [logits(load_exported(tmp_path / f"{bits}.safetensors")) for bits in (7, 4)]
    torch.testing.assert_close(joint_logits.softmax(1), sum(e.softmax(1) for e in each) / 2)
    measured = ("--radii", "0,1", "--samples", "2", "--images", "8", "--out", tmp_path / "figures")
    assert call("flatness", row["run"], *measured, *words) == 0
    assert call("export", row["run"], "--file", tmp_path / "joint.safetensors", *words) == 0
    assert torch.equal(logits(load_exported(tmp_path / "joint.safetensors")), joint_logits)
    assert call("ensemble", digests[0], digests[0], *words) == 2
    assert "given twice" in capsys.readouterr().err
    assert call("ensemble", digests[0], *words) == 2
    assert "at least two different runs" in capsys.readouterr().err
    assert call("import", tmp_path / "joint.safetensors", "--held-out", "rot45", *words) == 2
    assert "holds an ensemble" in capsys.readouterr().err
    assert call("import", file, "--held-out", "rot15", *words) == 0
    other = json.loads(capsys.readouterr().out.splitlines()[-1])[0]["run"]
    assert call("ensemble", digests[0], other, *words) == 2
    assert "must have the same data set, held-out domain" in capsys.readouterr().err


def test_a_file_that_cannot_come_in_is_a_sentence(tmp_path):
    setting, again = TINY.replace(held_out=("rot45",)), RunStore(tmp_path / "again")
    run = trained(tmp_path, RUNS["activations"]).run(RUNS["activations"])
    export(run, tmp_path / "file", PLACE)
    refuses(lambda: import_checkpoint(tmp_path / "file", setting, again, PLACE), "network quantizes activations")
    arrays, facts = files.load_arrays(tmp_path / "file")
    facts["network"] = {"name": "digits-cnn", "num_classes": 7, "in_channels": 1}
    arrays = {name: each[:7] if "head" in name else each for name, each in arrays.items() if "activations" not in name}
    files.save_arrays(tmp_path / "other", arrays, facts)
    refuses(lambda: import_checkpoint(tmp_path / "other", setting, again, PLACE), "is of other data", "7", "digits")
    flip(tmp_path / "other", 8 * ((tmp_path / "other").stat().st_size - 50))
    refuses(lambda: import_checkpoint(tmp_path / "other", setting, again, PLACE), "is damaged")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    for wanted in (spec(), quantized("INQ"), quantized()):
        trained(root, wanted)
    return RunStore(root)


def test_what_cannot_be_exported_is_a_sentence(store, tmp_path):
    file = tmp_path / "file.safetensors"
    refuses(
        lambda: export(store.run(spec()), file, PLACE), "(ERM) is not quantized; export one that is, such as of QT-DoG"
    )
    refuses(lambda: export(store.run(quantized(bits=3)), file, PLACE), "is not finished")
    floats = spec().replace(members=(spec(), spec()))
    join(floats, store, PLACE)
    refuses(lambda: export(store.run(floats), file, PLACE), "(2 x erm) is not quantized")
    refuses(lambda: export(store.run(quantized()), tmp_path / "net.onnx", PLACE), ".safetensors file, got", "net.onnx")
    refuses(lambda: load_exported(tmp_path / "none.safetensors"), "is missing")
    files.save_arrays(file, {"a": np.zeros(3)}, {"step": 1})
    refuses(lambda: load_exported(file), "is no export of a quantized network")
    export(store.run(quantized()), file, PLACE)
    flip(file, 8 * (file.stat().st_size - 50))
    refuses(lambda: load_exported(file), "is damaged")


def test_inq_before_its_last_stage_is_refused(store, tmp_path):
    run = store.run(quantized("INQ"))
    arrays, facts = files.load_arrays(run.checkpoint("last"))
    frozen = arrays["features.4.parametrizations.weight.0.frozen"]
    frozen[0, 0, 0, 0] = False
    files.save_arrays(run.checkpoint("early"), arrays, facts)
    refuses(
        lambda: export(run, tmp_path / "file.safetensors", PLACE, checkpoint="early"),
        "features.4.weight is not completely on its grid",
    )
    run.checkpoint("early").unlink()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--file", "net.onnx", "--format", "packed"),
            "--format packed writes a .safetensors file, but --file is net.onnx",
        ),
        (
            ("--file", "net.safetensors", "--format", "onnx"),
            "--format onnx writes a .onnx file, but --file is net.safet",
        ),
        (("--file", "net.bin", "--opset", "18"), "--opset is of ONNX files"),
    ],
)
def test_a_suffix_that_contradicts_the_format_is_refused(store, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert call("export", quantized().digest, "--store", store.root, *words) == 2
    assert sentence in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())


def test_the_command_prints_the_nominal_and_the_actual_size(store, tmp_path, capsys):
    words = ("export", quantized().digest, "--file", tmp_path / "seven.safetensors", "--store", store.root)
    assert call(*words) == 0
    size, told = (tmp_path / "seven.safetensors").stat().st_size, " ".join(capsys.readouterr().out.split())
    assert "nominally 4.57 times, 32 bits to 7" in told and f"{size:,} bytes" in told
    assert call(*words, "--json") == 0
    facts = documented("export", capsys.readouterr().out)
    assert facts["bytes"] == size and facts["compression"] == facts["float_bytes"] / facts["bytes"]
    assert load_exported(tmp_path / "seven.safetensors").head.weight.shape == (10, 1024)


# --- the format, as the docs have it -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["7 bits, tensor", "16 bits", "unsigned logarithmic", "activations", "powers of two"])
def test_the_reader_of_the_docs_reads_the_network_to_the_bit(tmp_path, name):
    page = (Path(__file__).parents[1] / "docs" / "packed-format.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 24
    scope = {}
    exec(code, scope)
    run = trained(tmp_path, RUNS[name]).run(RUNS[name])
    export(run, tmp_path / "file.safetensors", PLACE)
    read, expected = scope["read"](tmp_path / "file.safetensors"), load_exported(tmp_path / "file.safetensors")
    assert read.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert np.array_equal(read[key], value.numpy()), key
