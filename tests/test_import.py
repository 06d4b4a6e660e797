"""Checkpoints trained elsewhere: every family of names becomes the same network, and nothing is unpickled."""

import json
import re

import numpy as np
import pytest
import torch
from commandline import PETS, call, only_run, pets
from safetensors.torch import save_file

from flatlab import files
from flatlab.models.networks import build_network
from flatlab.specs.run import Place
from flatlab.store.runs import RunStore

AS = ("--dataset", "digits", "--held-out", "rot45")
SCRATCH = ("--model", "mobilenet_v2", "--image-size", "32", "--held-out", "sketch")


def bare(state):
    """Names as torchvision gives them: features without a prefix, the head as `fc`."""
    return {name.removeprefix("features.").replace("head.", "fc."): tensor for name, tensor in state.items()}


def domainbed(state):
    """DomainBed's `featurizer` and `classifier`, and both again inside `network`."""
    named = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        names = ("featurizer.network", "network.0.network") if part == "features" else ("classifier", "network.1")
        named |= {f"{each}.{rest}": tensor for each in names}
    return named


def swad(state):
    """SWAD's AveragedModel: DomainBed's under `module`, and a counter."""
    return {f"module.{name}": tensor for name, tensor in domainbed(state).items()} | {"n_averaged": torch.tensor(7)}


FORMS = {
    "ours.safetensors": lambda state, path: save_file(state, path),
    "ours.pth": lambda state, path: torch.save(state, path),
    "nested.pth": lambda state, path: torch.save({"model_dict": state, "args": {"lr": 5e-5}}, path),
    "bare.safetensors": lambda state, path: save_file(bare(state), path),
    "domainbed.pkl": lambda state, path: torch.save({"model_dict": domainbed(state)}, path),
    "swad.pth": lambda state, path: torch.save(swad(state), path),
    "half.safetensors": lambda state, path: save_file({n: t.half() for n, t in state.items()}, path),
    "no-counters.pth": lambda state, path: torch.save({n: t for n, t in state.items() if "tracked" not in n}, path),
}


@pytest.fixture(scope="module")
def state():
    network = build_network("digits-cnn", num_classes=10, in_channels=1, seed=5)
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("name", FORMS)
def test_a_foreign_checkpoint_becomes_a_run(state, tmp_path, capsys, name):
    FORMS[name](state, tmp_path / name)
    store = tmp_path / "runs"
    assert call("import", tmp_path / name, *AS, "--store", store, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["method"], row["held_out"]) == (only_run(store), "imported", "rot45")
    arrays, _ = files.load_arrays(RunStore(store).runs()[0].checkpoint("selected"))
    exact = name != "half.safetensors"
    for key, tensor in state.items():
        np.testing.assert_allclose(arrays[key], tensor.numpy(), rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3)


def test_the_run_has_the_accuracy_of_the_network_itself(state, tmp_path, capsys):
    from flatlab.loading import data as loading_data
    from flatlab.train.evaluate import Evaluator

    save_file(state, tmp_path / "net.safetensors")
    assert call("import", tmp_path / "net.safetensors", *AS, "--store", tmp_path / "runs", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    network = build_network("digits-cnn", num_classes=10, in_channels=1)
    network.load_state_dict(state)
    (run,) = RunStore(tmp_path / "runs").runs()
    judged = Evaluator(loading_data.domains(run.spec, Place()), torch.device("cpu"), run.spec).row(network, 0)
    assert row["validation"] == pytest.approx(judged["validation"])
    assert run.done and run.faults() == []


def test_torchvision_s_own_names(tmp_path, capsys):
    from torchvision.models import mobilenet_v2

    tree = pets(tmp_path / "pets")
    torch.save(mobilenet_v2(num_classes=2).state_dict(), tmp_path / "net.pth")
    given = ("import", tmp_path / "net.pth", *SCRATCH, "--dataset", f"folder:{tree}", "--store", tmp_path / "runs")
    assert call(*given) == 0
    assert RunStore(tmp_path / "runs").runs()[0].spec.model == "mobilenet_v2"


def test_twice_is_once_and_flatness_measures_it(state, tmp_path, capsys):
    save_file(state, tmp_path / "net.safetensors")
    for _ in range(2):
        assert call("import", tmp_path / "net.safetensors", *AS, "--store", tmp_path / "runs") == 0
    measure = ("--radii", "0,1", "--samples", "2", "--images", "8", "--out", tmp_path, "--store", tmp_path / "runs")
    assert call("flatness", only_run(tmp_path / "runs"), *measure, "--json") == 0


class Payload:
    """What only unpickling could build."""


REFUSED = {
    "absent.pth": (None, r"There is no file .*absent\.pth; give the \.safetensors or \.pth file"),
    "code.pth": (
        lambda state, path: torch.save({"model_dict": state, "algorithm": Payload()}, path),
        r"code\.pth cannot be read without unpickling Python objects, which runs code, so flatlab refuses",
    ),
    "torn.safetensors": (
        lambda state, path: path.write_bytes(b"\x00" * 40),
        r"torn\.safetensors cannot be read as a checkpoint",
    ),
    "torn.pth": (
        lambda state, path: path.write_bytes(b"PK\x03\x04 and no more"),
        r"torn\.pth cannot be read as a checkpoint",
    ),
    "empty.pth": (lambda state, path: torch.save({"epoch": 3}, path), r"empty\.pth holds no tensors by name"),
    "other.pth": (
        lambda state, path: torch.save({**state, "features.0.weight": torch.ones(8, 1, 3, 3)}, path),
        r"other\.pth does not fit digits-cnn, which has 20 tensors: 1 of another shape \(first features\.0\.w",
    ),
    "alien.pth": (
        lambda state, path: torch.save({"encoder.w": torch.ones(3)}, path),
        r"alien\.pth does not fit digits-cnn, which has 20 tensors: 17 missing .*; 1 unexpected \(first encoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_checkpoint_is_refused(state, tmp_path, capsys, name):
    write, sentence = REFUSED[name]
    if write:
        write(state, tmp_path / name)
    assert call("import", tmp_path / name, *AS, "--store", tmp_path / "runs") == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert re.search(sentence, told.err), told.err
    assert not RunStore(tmp_path / "runs").runs()


def test_a_domain_must_be_named(state, tmp_path, capsys):
    save_file(state, tmp_path / "net.safetensors")
    assert call("import", tmp_path / "net.safetensors", "--store", tmp_path) == 2
    assert "Give the domain held out in training: --held-out rot0|rot15|rot30|rot45" in capsys.readouterr().err


def test_training_may_start_from_a_file_of_weights(tmp_path, capsys):
    tree = pets(tmp_path / "pets")
    network = build_network("digits-cnn", num_classes=2, in_channels=3, seed=9)
    save_file({n: t.contiguous() for n, t in network.state_dict().items()}, tmp_path / "net.safetensors")
    given = ("train", *PETS, "--dataset", f"folder:{tree}", "--weights", tmp_path / "net.safetensors")
    assert call(*given, "--store", tmp_path / "runs") == 0, capsys.readouterr().err
    (run,) = RunStore(tmp_path / "runs").runs()
    assert run.spec.weights.startswith("sha256:") and run.spec.freeze_batchnorm and run.spec.lr == 5e-5
    arrays, _ = files.load_arrays(run.checkpoint("last"))
    np.testing.assert_array_equal(arrays["features.1.running_mean"], 0)  # frozen
