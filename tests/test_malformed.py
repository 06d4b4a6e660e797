"""Malformed checkpoints, exports and weights files: each is refused in one sentence that names it, memory untaken."""

import io
import json
import math
import pickle
import re
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import call
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file
from stores import PLACE, TINY, spec

from flatlab import files
from flatlab.errors import UserError
from flatlab.loading.export import load_exported, write
from flatlab.models.foreign import fitted, read_foreign
from flatlab.models.networks import Ensemble, build_network
from flatlab.quant.attach import attach
from flatlab.specs.methods import METHODS, compose
from flatlab.store.runs import RunStore
from flatlab.train.imported import import_checkpoint

QUANTIZED = compose(METHODS["QT-DoG"], TINY, held_out="rot45", seed=0, trial_seed=0)
FIRST, NORM = "features.0.weight", "features.1.running_var"


def network(**options):
    return build_network("digits-cnn", num_classes=10, in_channels=1, **options).eval()


@pytest.fixture(scope="module")
def state():
    return {name: tensor.contiguous() for name, tensor in network(seed=5).state_dict().items()}


def said(act, path):
    """Return the one sentence that a refusal is; it names the file, and its peak of memory is small."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        act()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    sentence = str(error.value)
    assert path.name in sentence and "\n" not in sentence and len(sentence) < 600, sentence
    assert grown < 2**28, f"{grown:,} bytes"
    return sentence


# --- checkpoints of other code bases -----------------------------------------------------------------------------


def set_to(name, value, place=(0,)):
    def change(state):
        tensor = state[name].clone()
        tensor[place] = value
        return {**state, name: tensor}

    return change


def swap(name, change):
    return lambda state: {**state, name: change(state[name])}


STATES = {  # what is wrong with a state_dict -> the change, and what the sentence says
    "nan": (set_to(FIRST, math.nan), r"features\.0\.weight holds 9 of 144 values that are not finite"),
    "inf": (set_to(FIRST, math.inf), "9 of 144 values that are not finite"),
    "beyond single precision": (swap(FIRST, lambda t: t.double() * 1e300), "values that are not finite"),
    "nan in a statistic": (
        set_to("features.1.running_mean", math.nan),
        r"running_mean holds 1 of 16 values that are no",
    ),
    "negative variance": (set_to(NORM, -0.5), r"features\.1\.running_var holds a variance below zero, -0\.5"),
    "negative count": (swap("features.1.num_batches_tracked", lambda t: t - 3), "num_batches_tracked is not a count"),
    "integers": (swap(FIRST, lambda t: t.long()), "holds int64 values; floating-point ones are expected"),
    "booleans": (swap(FIRST, lambda t: t > 0), "holds bool values"),
    "complex": (swap(FIRST, lambda t: t.to(torch.complex64)), "holds complex64 values"),
    "sparse": (swap("head.weight", lambda t: t.to_sparse()), "is not a dense tensor"),
    "transposed": (swap("head.weight", lambda t: t.T.contiguous()), r"\(1024, 10\) where \(10, 1024\) is expected"),
    "scalar": (swap(FIRST, lambda t: torch.zeros(())), r"shape \(\) where \(16, 1, 3, 3\)"),
    "empty": (swap(FIRST, lambda t: torch.zeros(0, 1, 3, 3)), r"shape \(0, 1, 3, 3\) where"),
    "huge by strides": (
        swap(FIRST, lambda t: torch.zeros(1).expand(2**40, 1, 3, 3)),
        r"\(1099511627776, 1, 3, 3\) where",
    ),
    "huge by strides, of no name": (lambda s: {**s, "x": torch.zeros(1).expand(2**40)}, "1 unexpected .first x, shape"),
    "twins that differ": (
        lambda s: {**s, f"module.{FIRST}": s[FIRST] + 1},
        r"holds features\.0\.weight and module\.features\.0\.weight, which differ",
    ),
    "missing": (lambda s: {n: t for n, t in s.items() if n != FIRST}, r"1 missing \(first features\.0\.weight, shape"),
    "twins of two types": (lambda s: {**s, f"module.{FIRST}": s[FIRST].half()}, "which differ and are both"),
    "a counter alone": (lambda s: {"n_averaged": torch.tensor(3)}, "missing .first features.0.weight"),
    "extra": (lambda s: {**s, "features.99.weight": torch.ones(3)}, r"1 unexpected \(first features\.99\.weight, sha"),
    "metric beside it": (
        lambda s: {**{f"net.{n}": t for n, t in s.items()}, "acc.sum": torch.ones(1)},
        r"first acc\.sum",
    ),
    "names of another": (lambda s: {f"blocks.{i}.w": t for i, t in enumerate(s.values())}, r"first blocks\.\d+\.w"),
    "traversal": (lambda s: {**s, "../../x": torch.ones(1)}, r"first \.\./\.\./x"),
    "latent weights": (lambda s: {**s, "features.0.parametrizations.weight.0.scale": torch.ones(1)}, "bake.. it, then"),
}
SPARSE = {"sparse", "huge by strides", "huge by strides, of no name"}  # what safetensors cannot write


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_that_cannot_be_the_networks_is_refused_by_name(state, tmp_path, name, suffix):
    change, sentence = STATES[name]
    file = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(change(state), file)
    elif name in SPARSE:
        pytest.skip("safetensors holds dense tensors alone")
    else:
        save_file({key: tensor.clone() for key, tensor in change(state).items()}, file)
    expected = network().state_dict()
    found = said(lambda: fitted(read_foreign(file), expected, name="digits-cnn", source=file.name), file)
    assert re.search(sentence, found), found
    if "head" not in sentence and name not in ("sparse", "transposed"):
        found = said(lambda: network(weights=file), file)
        assert re.search(sentence, found), found


def pth(state):
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def header(change):
    """Rewrite the header of a safetensors file."""

    def make(state):
        stream = safetensors_bytes(state)
        length = struct.unpack("<Q", stream[:8])[0]
        head = json.loads(stream[8 : 8 + length])
        told = json.dumps(change(head) or head).encode()
        return struct.pack("<Q", len(told)) + told + stream[8 + length :]

    return make


def entry(**fields):
    return lambda head: head[FIRST].update(fields)


def bomb(state):
    """An archive of torch.save whose entries are compressed, a thousandfold."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(pth(state))) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for each in old.namelist():
            new.writestr(each, old.read(each))
        new.writestr("archive/data/99", bytes(2**28))
    return stream.getvalue()


def claims(state):
    """A plain pickle of the old format that claims a storage of 16 TB."""
    stream = io.BytesIO()
    torch.save({FIRST: torch.zeros(3)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue().replace(b"K\x03N", b"\x8a\x06\x00\x00\x00\x00\x00\x04N")


BYTES = {  # what is wrong with a file
    "empty.pth": lambda state: b"",
    "text.pth": lambda state: b"<html>not found</html>",
    "cut in half.pth": lambda state: pth(state)[: len(pth(state)) // 2],
    "cut at the end.pth": lambda state: pth(state)[:-30],
    "cut at the beginning.pth": lambda state: pth(state)[7:],
    "zeros.pth": lambda state: bytes(5000),
    "noise.pth": lambda state: np.random.RandomState(0).bytes(5000),
    "pickle of a number.pth": lambda state: pickle.dumps(3),
    "pickle cut.pth": lambda state: pickle.dumps({"a": list(range(999))})[:-40],
    "a list.pth": lambda state: pth(list(state.values())),
    "a number.pth": lambda state: pth(3.5),
    "no tensors.pth": lambda state: pth({"state_dict": {"a": 1}, "epoch": 3}),
    "names that are none.pth": lambda state: pth(dict(enumerate(state.values()))),
    "a container of nothing.pth": lambda state: pth({"state_dict": {}}),
    "a bomb.pth": bomb,
    "old format.pth": claims,
    "zip of text.pth": lambda state: zipped({"a.txt": b"hello"}),
    "zip of nothing.pth": lambda state: zipped({}),
    "zip of a wrong pickle.pth": lambda state: zipped({"archive/data.pkl": b"no pickle", "archive/version": b"3\n"}),
    "empty.safetensors": lambda state: b"",
    "cut in half.safetensors": lambda state: safetensors_bytes(state)[:70000],
    "cut in the header.safetensors": lambda state: safetensors_bytes(state)[:90],
    "longer.safetensors": lambda state: safetensors_bytes(state) + bytes(10),
    "header of 16 EB.safetensors": lambda state: struct.pack("<Q", 2**63) + safetensors_bytes(state)[8:],
    "header is no JSON.safetensors": lambda state: struct.pack("<Q", 4) + b"{{{{" + bytes(8),
    "header is a list.safetensors": lambda state: struct.pack("<Q", 2) + b"[]",
    "header of nothing.safetensors": lambda state: struct.pack("<Q", 2) + b"{}",
    "shape of 4 TB.safetensors": header(entry(shape=[2**40])),
    "shape below zero.safetensors": header(entry(shape=[-16, 1, 3, 3])),
    "shape of words.safetensors": header(entry(shape="large")),
    "offsets beyond.safetensors": header(entry(data_offsets=[0, 2**40])),
    "offsets reversed.safetensors": header(entry(data_offsets=[576, 0])),
    "unknown type.safetensors": header(entry(dtype="F7")),
    "other type.safetensors": header(entry(dtype="I16")),
    "no type.safetensors": header(lambda head: head[FIRST].pop("dtype") and head),
    "pth by its content.safetensors": pth,
    "safetensors by its content.pth": safetensors_bytes,
}


def zipped(members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize("name", BYTES)
def test_a_file_that_is_no_checkpoint_is_refused_in_a_sentence(state, tmp_path, name):
    file = tmp_path / name.replace(" ", "-")
    file.write_bytes(BYTES[name](state))
    said(lambda: network(weights=file), file)


# --- names -------------------------------------------------------------------------------------------------------


def torchvision(state):
    return {name.removeprefix("features.").replace("head.", "fc."): tensor for name, tensor in state.items()}


def under(prefix, *, head=""):
    def rename(state):
        bare = torchvision(state)
        return {(head if name.startswith("fc.") and head else prefix) + name: each for name, each in bare.items()}

    return rename


NAMES = {
    "compiled": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "compiled and parallel": lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    "lightning": lambda s: {"state_dict": {f"net.{n}": t for n, t in s.items()}, "epoch": 1},
    "lightning, compiled": lambda s: {"state_dict": {f"model._orig_mod.{n}": t for n, t in s.items()}},
    "model_state_dict": lambda s: {"model_state_dict": dict(s), "optimizer": {}},
    "nested": lambda s: {"model": {"state_dict": dict(s)}},
    "timm's average": lambda s: {"state_dict_ema": dict(s)},
    "an average's own": lambda s: {"model_ema": {f"module.{n}": t for n, t in s.items()}},
    "weights before their average": lambda s: {
        "state_dict": dict(s),
        "state_dict_ema": {n: t + 1 for n, t in s.items()},
    },
    "a backbone with its head inside": under("backbone."),
    "a backbone with its head beside it": under("model.backbone.", head="model."),
    "an encoder, parallel": under("module.encoder.", head="module."),
    "any name": under("resnet."),
    "any two names": under("my.resnet."),
    "any name, parallel": under("module.resnet."),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_fit_exactly_are_understood(state, tmp_path, name):
    torch.save(NAMES[name](state), tmp_path / "net.pth")
    found = fitted(read_foreign(tmp_path / "net.pth"), network().state_dict(), name="digits-cnn", source="net.pth")
    assert found.keys() == state.keys() and all(torch.equal(found[each], state[each]) for each in state)


# --- exports -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An exported network's arrays and facts."""
    quantized = network(seed=5)
    attach(quantized, bits=7)
    file = tmp_path_factory.mktemp("export") / "net.safetensors"
    write(quantized, QUANTIZED, file, PLACE)
    return files.load_arrays(file)


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """An exported ensemble's."""
    members = [network(seed=seed) for seed in (1, 2)]
    attach(members[0], bits=7)
    file = tmp_path_factory.mktemp("joint") / "net.safetensors"
    write(Ensemble(members), spec().replace(members=(QUANTIZED, spec())), file, PLACE)
    return files.load_arrays(file)


def fact(*path, value):
    def change(arrays, facts):
        inside = facts
        for part in path[:-1]:
            inside = inside[part]
        inside[path[-1]] = value

    return change


def without(*path):
    def change(arrays, facts):
        inside = facts
        for part in path[:-1]:
            inside = inside[part]
        del inside[path[-1]]

    return change


def array(name, change):
    def act(arrays, facts):
        arrays[name] = change(arrays[name])

    return act


def gone(name):
    return lambda arrays, facts: arrays.pop(name)


def filled(value):
    def change(array):
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change


GRID = ("quantized", FIRST)
EXPORTS = {
    "weights of elsewhere": fact("network", "weights", value="/etc/passwd"),
    "weights of torchvision": fact("network", "weights", value="imagenet"),
    "a seed": fact("network", "seed", value=3),
    "an unknown network": fact("network", "name", value="resnet1001"),
    "a path as its name": fact("network", "name", value="../../digits-cnn"),
    "a number as its name": fact("network", "name", value=3),
    "another network": fact("network", "name", value="resnet18"),
    "no name": without("network", "name"),
    "no network": without("network"),
    "a network that is a list": fact("network", value=[]),
    "a network that is none": fact("network", value=None),
    "no classes": fact("network", "num_classes", value=0),
    "classes below zero": fact("network", "num_classes", value=-10),
    "a class too many": fact("network", "num_classes", value=11),
    "classes that fill memory": fact("network", "num_classes", value=2**31),
    "classes beyond counting": fact("network", "num_classes", value=10**30),
    "classes in words": fact("network", "num_classes", value="10"),
    "classes and a half": fact("network", "num_classes", value=10.5),
    "classes yes": fact("network", "num_classes", value=True),
    "channels that fill memory": fact("network", "in_channels", value=2**31),
    "no channels": fact("network", "in_channels", value=0),
    "activations that are a word": fact("network", "activations", value="signed"),
    "activations of no file": fact("network", "activations", value={"bits": 8, "signed": False}),
    "activations of 99 bits": fact("network", "activations", value={"bits": 99, "signed": False}),
    "activations of a sign in words": fact("network", "activations", value={"bits": 8, "signed": "no"}),
    "nothing quantized": fact("quantized", value={}),
    "quantized is a list": fact("quantized", value=[FIRST]),
    "quantized is null": fact("quantized", value=None),
    "a grid that is null": fact(*GRID, value=None),
    "a grid of nothing": fact(*GRID, value={}),
    "a weight that is none": fact(
        "quantized", "features.77.weight", value={"shape": [2, 2], "low": -2, "bits": 2, "grid": "uniform"}
    ),
    "one bit": fact(*GRID, "bits", value=1),
    "no bits": fact(*GRID, "bits", value=0),
    "bits below zero": fact(*GRID, "bits", value=-7),
    "64 bits": fact(*GRID, "bits", value=64),
    "a bit more": fact(*GRID, "bits", value=8),
    "a bit less": fact(*GRID, "bits", value=6),
    "bits in words": fact(*GRID, "bits", value="seven"),
    "lowest code above": fact(*GRID, "low", value=5),
    "lowest code below": fact(*GRID, "low", value=-1000),
    "lowest code beyond counting": fact(*GRID, "low", value=-(10**40)),
    "lowest code of INQ, codes of LSQ": fact(*GRID, "low", value=-62),
    "unknown grid": fact(*GRID, "grid", value="logarithmic"),
    "powers of two of 7 bits": fact(*GRID, "grid", value="power-of-two"),
    "shape of another": fact(*GRID, "shape", value=[16, 9, 1, 1]),
    "shape that fills memory": fact(*GRID, "shape", value=[2**31, 2**31]),
    "shape beyond counting": fact(*GRID, "shape", value=[10**30, 10**30]),
    "shape below zero": fact(*GRID, "shape", value=[-16, 1, 3, -3]),
    "shape of nothing": fact(*GRID, "shape", value=[]),
    "shape of zeros": fact(*GRID, "shape", value=[0, 1, 3, 3]),
    "shape in words": fact(*GRID, "shape", value="16x1x3x3"),
    "shape of many axes": fact(*GRID, "shape", value=[1] * 100),
    "an unknown fact of a grid": fact(*GRID, "zero_point", value=3),
    "an unknown fact": fact("code", value="import os"),
    "codes are gone": gone(f"{FIRST}.codes"),
    "codes too few": array(f"{FIRST}.codes", lambda a: a[:-1]),
    "codes too many": array(f"{FIRST}.codes", lambda a: np.append(a, a)),
    "no codes": array(f"{FIRST}.codes", lambda a: a[:0]),
    "codes of another type": array(f"{FIRST}.codes", lambda a: a.astype(np.int64)),
    "codes as floats": array(f"{FIRST}.codes", lambda a: a.astype(np.float32)),
    "codes in two axes": array(f"{FIRST}.codes", lambda a: a.reshape(-1, 2)),
    "step sizes are gone": gone(f"{FIRST}.scale"),
    "step sizes of nan": array(f"{FIRST}.scale", filled(math.nan)),
    "step sizes of inf": array(f"{FIRST}.scale", filled(math.inf)),
    "step sizes below zero": array(f"{FIRST}.scale", filled(-1)),
    "step sizes of zero": array(f"{FIRST}.scale", filled(0)),
    "step sizes too few": array(f"{FIRST}.scale", lambda a: a[:3]),
    "step sizes in one axis": array(f"{FIRST}.scale", lambda a: a.reshape(-1)),
    "step sizes of another type": array(f"{FIRST}.scale", lambda a: a.astype(np.float64)),
    "step sizes as integers": array(f"{FIRST}.scale", lambda a: a.astype(np.int32)),
    "a bias is gone": gone("head.bias"),
    "a tensor too many": lambda arrays, facts: arrays.update(x=np.zeros(3, np.float32)),
    "a path as a tensor": lambda arrays, facts: arrays.update({"../../x": np.zeros(3, np.float32)}),
    "a bias of another shape": array("head.bias", lambda a: a[:-1]),
    "a bias of another type": array("head.bias", lambda a: a.astype(np.float16)),
    "a bias of integers": array("head.bias", lambda a: a.astype(np.int64)),
    "a bias of nan": array("head.bias", filled(math.nan)),
    "a variance below zero": array(NORM, filled(-1)),
    "a count below zero": array("features.1.num_batches_tracked", lambda a: a - 5),
}
JOINT = {
    "an unknown mean": fact("combine", value="geometric"),
    "no mean": without("combine"),
    "no members": fact("members", value=[]),
    "members that are a number": fact("members", value=2),
    "a member that is null": fact("members", 0, value=None),
    "a member that is a word": fact("members", 0, value="7"),
    "a member less": without("members", 1),
    "a member more": lambda arrays, facts: facts["members"].append(facts["members"][0]),
    "weights of elsewhere": fact("members", 1, "network", "weights", value="/etc/passwd"),
    "a member's tensor is gone": gone("1.head.bias"),
    "a tensor of no member": lambda arrays, facts: arrays.update({"7.head.bias": np.zeros(10, np.float32)}),
    "a tensor of none": lambda arrays, facts: arrays.update({"head.bias": np.zeros(10, np.float32)}),
    "a member below zero": lambda arrays, facts: arrays.update({"-1.head.bias": np.zeros(10, np.float32)}),
}


def altered(content, change, tmp_path):
    arrays, facts = dict(content[0]), json.loads(json.dumps(content[1]))
    change(arrays, facts)
    files.save_arrays(tmp_path / "net.safetensors", arrays, facts)
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("name", EXPORTS)
def test_a_malformed_export_is_refused_in_a_sentence(export, tmp_path, monkeypatch, name):
    file = altered(export, EXPORTS[name], tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a foreign file was opened"))
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda *_: pytest.fail("a download began"))
    sentence = said(lambda: load_exported(file), file)
    setting, store = TINY.replace(held_out=("rot45",)), RunStore(tmp_path / "runs")
    assert said(lambda: import_checkpoint(file, setting, store, PLACE), file) == sentence


@pytest.mark.parametrize("name", JOINT)
def test_a_malformed_ensemble_is_refused_in_a_sentence(joint, tmp_path, name):
    file = altered(joint, JOINT[name], tmp_path)
    said(lambda: load_exported(file), file)


def test_what_is_not_altered_is_read(export, joint, tmp_path):
    assert load_exported(altered(export, lambda *_: None, tmp_path)).head.out_features == 10
    assert len(load_exported(altered(joint, lambda *_: None, tmp_path)).members) == 2


NOTES = {
    "no note": None,
    "a note that is no JSON": "{{",
    "a note that is a list": "[]",
    "a note that is a number": "3",
    "a note without a hash": json.dumps({"meta": "{}"}),
    "a note of another hash": json.dumps({"sha256": "0" * 64, "meta": "{}"}),
    "meta that is a number": json.dumps({"sha256": "0" * 64, "meta": 3}),
    "meta that is null": json.dumps({"sha256": "0" * 64, "meta": None}),
    "meta that is no JSON": "meta",
    "meta that is a list": "list",
    "meta that is deep": "deep",
}


@pytest.mark.parametrize("name", NOTES)
def test_a_header_of_another_kind_is_refused_in_a_sentence(tmp_path, name):
    array, note = np.zeros(3, np.float32), NOTES[name]
    metas = {"meta": "{{", "list": "[1]", "deep": "[" * 100_000}
    if note in metas:
        header = {"owner": "", "meta": metas[note]}
        note = json.dumps({**header, "sha256": files.content_hash([header["owner"], header["meta"]], {"a": array})})
    save_file({"a": torch.from_numpy(array)}, tmp_path / "net.safetensors", metadata=note and {"flatlab": note})
    said(lambda: load_exported(tmp_path / "net.safetensors"), tmp_path / "net.safetensors")
    told = call("import", tmp_path / "net.safetensors", "--held-out", "rot45", "--store", tmp_path / "runs")
    assert told == 2


@pytest.mark.parametrize("path", ["net.safetensors", "."])
def test_what_is_no_file_is_no_export(tmp_path, path):
    said(lambda: load_exported(tmp_path / path), tmp_path / path)


# --- through the command line ------------------------------------------------------------------------------------

COMMANDS = {
    "nan": lambda state, export, path: torch.save(STATES["nan"][0](state), path),
    "negative variance": lambda state, export, path: torch.save(STATES["negative variance"][0](state), path),
    "codes too few": lambda state, export, path: altered(export, EXPORTS["codes too few"], path.parent).rename(path),
    "no layer's codes": lambda state, export, path: altered(export, EXPORTS["nothing quantized"], path.parent).rename(
        path
    ),
    "weights of elsewhere": lambda state, export, path: altered(
        export, EXPORTS["weights of elsewhere"], path.parent
    ).rename(path),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_refuses_them_with_code_2_and_leaves_no_run(state, export, tmp_path, capsys, name):
    file = tmp_path / f"file{'.pth' if name in STATES else '.safetensors'}"
    COMMANDS[name](state, export, file)
    assert call("import", file, "--held-out", "rot45", "--store", tmp_path / "runs") == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and file.name in told.err and "bug" not in told.err
    assert not list(Path(tmp_path / "runs").glob("*"))
