"""Training on photographs: real ones from PACS where they are at hand, made ones elsewhere; precision, and memory."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatlab import files
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.measure.runner import measure
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.run import Place
from flatlab.specs.settings import PAPER, SMOKE, for_data, setting
from flatlab.store.runs import RunStore
from flatlab.tensors import memory
from flatlab.train import evaluate
from flatlab.train.loop import Training, train

DATA = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = DATA / "weights" / "mobilenet_v2-imagenet-fp16.safetensors"
needs_data = pytest.mark.skipif(not WEIGHTS.exists(), reason=f"PACS and MobileNetV2's weights are not at {DATA}")
DOMAINS = ("photo", "sketch", "third")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three domains of two classes, ten images in each, of several sizes."""
    root = tmp_path_factory.mktemp("animals")
    for seed, (domain, each) in enumerate((domain, each) for domain in DOMAINS for each in ("cat", "dog")):
        (root / domain / each).mkdir(parents=True)
        noise = np.random.RandomState(seed)
        for k in range(10):
            pixels = noise.randint(0, 200, (20 + k, 30 - k, 3)) + (50 if each == "cat" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / domain / each / f"{k}.png")
    return root


@pytest.fixture
def place(tree):
    return Place(device="cpu", data_dir=str(tree))


def spec_of(method="ERM", **changes):
    chosen = for_data(SMOKE.replace(steps=4, eval_every=2, batch_size=3), "folder:animals", model="digits-cnn")
    chosen = chosen.replace(model="digits-cnn", image_size=12, domains=DOMAINS, held_out=DOMAINS[:1])
    return compose(METHODS[method], chosen, held_out="photo", seed=0, trial_seed=0).replace(**changes)


def trained(root, spec, place):
    store = RunStore(root)
    train([spec], store, place)
    return store.run(spec)


def weights(run):
    return files.load_arrays(run.checkpoint("last"))[0]


def same(first, second):
    return all(np.array_equal(first[name], second[name]) for name in first)


# --- specs -------------------------------------------------------------------------------------------------------


def test_photographs_are_augmented_and_digits_are_not():
    assert (PAPER.augment, SMOKE.augment, for_data(SMOKE, "PACS").augment) == ("domainbed", "none", "domainbed")
    assert for_data(PAPER, "digits").augment == "none"
    assert spec_of().augment == "domainbed" and spec_of().precision == "fp32"
    assert setting("paper", precision="bf16").precision == "bf16"
    with pytest.raises(UserError, match=r"precision must be 'fp32' or 'bf16', got 'fp16'"):
        spec_of(precision="fp16")


# --- made photographs --------------------------------------------------------------------------------------------


def test_augmentation_and_precision_decide_the_bytes_and_nothing_else_does(tmp_path, place):
    runs = {}
    for name, changes in {"": {}, "plain": {"augment": "none"}, "bf16": {"precision": "bf16"}}.items():
        runs[name] = trained(tmp_path / "a", spec_of(**changes), place)
        again = trained(tmp_path / "b", spec_of(**changes), place.replace(cache=str(tmp_path / f"cache{name}")))
        assert same(weights(runs[name]), weights(again))
    assert len({run.spec.digest for run in runs.values()}) == 3
    assert not same(weights(runs[""]), weights(runs["plain"]))
    assert not same(weights(runs[""]), weights(runs["bf16"]))


@pytest.mark.parametrize("method", ["SAM", "QT-DoG", "SWAD"])
def test_every_kind_of_step_trains_in_bf16_and_is_measured_in_fp32(method, tmp_path, place):
    run = trained(tmp_path, spec_of(method, precision="bf16"), place)
    assert all(array.dtype != np.float16 for array in weights(run).values())
    assert all(np.isfinite(array).all() for array in weights(run).values())
    measurement = SphereSpec(radii=(0.0, 0.5), num_samples=2, images=4)
    measure(run, measurement, place)
    assert run.measurement(measurement).done


def test_bf16_is_in_the_training_pass_alone(tmp_path, place):
    store, spec = RunStore(tmp_path), spec_of(precision="bf16")
    training = Training([store.run(spec)], store, place, forks=())
    network, seen = training.trajectory.network, set()
    hook = network.head.register_forward_hook(lambda module, given, logits: seen.add((module.training, logits.dtype)))
    training.run(None)
    hook.remove()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_measurements_are_the_same_whether_batches_are_kept_or_made_each_time(tmp_path, place, monkeypatch):
    measurement, results = SphereSpec(radii=(0.0, 0.5), num_samples=2), []
    for bytes_kept in (2**28, 0):
        monkeypatch.setattr("flatlab.data.batches.KEPT", bytes_kept)
        run = trained(tmp_path / str(bytes_kept), spec_of(), place)
        measure(run, measurement, place)
        results.append(run.measurement(measurement).hashes())
    assert results[0] == results[1]


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_evaluation_goes_on_in_halves_and_says_so(kind, caplog, place):
    spec = spec_of()
    domains = loading_data.domains(spec, place)
    network = loading_network.network(spec, domains.data, place).eval()
    batches = {name: domains.evaluation("in", (name,), torch.device("cpu"))[name] for name in domains.data.names}
    whole = evaluate.evaluate(network, batches)

    def refuse(module, given):
        if len(given[0]) > 5:
            raise kind("out of memory")

    network.register_forward_pre_hook(refuse)
    with caplog.at_level(logging.WARNING, "flatlab"):
        halves = evaluate.evaluate(network, batches)
    assert "Out of memory: evaluating 8 images at a time instead of 16." in caplog.messages
    for name in batches:
        assert halves[name] == pytest.approx(whole[name])


def test_what_does_not_fit_at_all_or_is_no_lack_of_memory_is_not_hidden(place):
    network = torch.nn.Identity()
    network.register_forward_pre_hook(lambda module, given: (_ for _ in ()).throw(MemoryError("none at all")))
    with pytest.raises(MemoryError):
        evaluate.evaluate(network, {"a": [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))]})
    with pytest.raises(RuntimeError, match="mat1"):
        evaluate.evaluate(torch.nn.Linear(3, 2), {"a": [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))]})
    assert memory.out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"))


def test_the_training_batch_is_never_made_smaller(tmp_path, place):
    store, spec = RunStore(tmp_path), spec_of()
    training = Training([store.run(spec)], store, place, forks=())

    def refuse(module, given):
        if module.training:
            raise torch.OutOfMemoryError("out of memory")

    training.trajectory.network.register_forward_pre_hook(refuse)
    with pytest.raises(UserError, match=r"with 3 images of each source domain on cpu; take a smaller --batch-size"):
        training.run(None)
    assert not store.run(spec).done


# --- PACS --------------------------------------------------------------------------------------------------------


@needs_data
def test_pacs_with_pretrained_weights(tmp_path, tmp_path_factory):
    """Three updates on real photographs at 32 pixels: BatchNorm's statistics stay, the rest moves, labels fit."""
    root = tmp_path / "PACS"  # a few images of each class, linked
    for folder in (each for domain in (DATA / "PACS").iterdir() for each in domain.iterdir()):
        target = root / folder.parent.name / folder.name
        target.mkdir(parents=True)
        for image in sorted(folder.iterdir())[:8]:
            (target / image.name).symlink_to(image)
    place = Place(device="cpu", data_dir=str(root), weights_file=str(WEIGHTS))
    chosen = for_data(SMOKE, "PACS", model="mobilenet_v2", weights=f"sha256:{files.file_hash(WEIGHTS)}")
    chosen = chosen.replace(model="mobilenet_v2", image_size=32, steps=2, eval_every=2, batch_size=4)
    spec = compose(METHODS["ERM"], chosen, held_out="sketch", seed=0, trial_seed=0)
    assert spec.freeze_batchnorm and spec.lr == 5e-5 and spec.augment == "domainbed"
    start = loading_network.network(spec, loading_data.domains(spec, place).data, place).state_dict()
    end = weights(trained(tmp_path / "runs", spec, place))
    for name, before in start.items():
        moved = not np.array_equal(before.numpy(), end[name])
        assert moved == (not name.endswith(("running_mean", "running_var", "num_batches_tracked"))), name
