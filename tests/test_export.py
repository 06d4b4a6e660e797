"""Codes as bits, and quantized runs as files: the round trip is exact, and the bytes are told as they are."""

import json

import numpy as np
import pytest
import torch
from commandline import call
from stores import PLACE, TINY, flip, refuses, spec, trained

from flatlab import checkpoints, files
from flatlab.api import load_exported
from flatlab.export import export
from flatlab.methods import METHODS, compose
from flatlab.quant.attach import bake
from flatlab.quant.packing import bits_of, pack, unpack
from flatlab.runs import RunStore

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
    loaded, expected = load_exported(tmp_path / "file.safetensors"), checkpoints.network(run, "selected", PLACE)
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
    count = 16 * 9 + 32 * 16 * 9 + 64 * 32 * 9
    assert told.quantized_share == pytest.approx(
        count / (33658 + 3 * (wanted.quantizer == RUNS["activations"].quantizer))
    )
    assert told.float_bytes == pytest.approx(4 * 33658, rel=0.01)
    rest = 4 * (33658 - count) + 4 * (1 if wanted.quantizer.granularity == "tensor" else 112)
    assert 0 < told.bytes - rest - count * bits / 8 < 5000  # the header's names, BatchNorm's statistics
    assert told.compression < told.nominal


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    for wanted in (spec(), quantized("INQ"), quantized()):
        trained(root, wanted)
    return RunStore(root)


def test_what_cannot_be_exported_is_a_sentence(store, tmp_path):
    file = tmp_path / "file.safetensors"
    refuses(lambda: export(store.run(spec()), file, PLACE), "is not quantized; export one that is")
    refuses(lambda: export(store.run(quantized(bits=3)), file, PLACE), "is not finished")
    both = quantized().replace(members=(quantized(), quantized(bits=8)))
    run = store.run(both)
    run.create()
    run.finish()
    refuses(lambda: export(run, file, PLACE), "is an ensemble; export its members")
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
        "features.4.weight is not wholly on its grid",
    )
    run.checkpoint("early").unlink()


def test_the_command_tells_the_nominal_and_the_true_size(store, tmp_path, capsys):
    words = ("export", quantized().digest, "--file", tmp_path / "seven.safetensors", "--store", store.root)
    assert call(*words) == 0
    size, told = (tmp_path / "seven.safetensors").stat().st_size, " ".join(capsys.readouterr().out.split())
    assert "nominally 4.57 times, 32 bits to 7" in told and f"{size:,} bytes" in told
    assert call(*words, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == size and facts["compression"] == facts["float_bytes"] / facts["bytes"]
    assert load_exported(tmp_path / "seven.safetensors").head.weight.shape == (10, 1024)
