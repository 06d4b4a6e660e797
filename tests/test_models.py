"""Networks by name, their initialisation, BatchNorm's two ways of standing still, and weights of foreign origin."""

import argparse
import copy
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
from torch import nn

from flatlab.errors import UserError
from flatlab.models.foreign import fitted, read_foreign
from flatlab.models.networks import CNNS, build_network, frozen_statistics, set_training

WEIGHTS = Path(__file__).parents[2] / "shared" / "data" / "weights" / "mobilenet_v2-imagenet-fp16.safetensors"
WIDTHS = {"digits-cnn": 1024, "resnet18": 512, "resnet50": 2048, "mobilenet_v2": 1280}
WIDTHS |= {"digits-resnext": 1024, "digits-densenet": 1072, "resnext50_32x4d": 2048, "densenet121": 1024}
WIDTHS |= {name: 16 * width * 2 ** (depth - 1) for name, (width, depth) in CNNS.items()}
needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason=f"the ImageNet weights are not at {WEIGHTS}")


def digits_network(**options):
    return build_network("digits-cnn", num_classes=10, in_channels=1, **options)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def snapshot(network):
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


# --- building ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WIDTHS)
def test_every_model_ends_in_flat_features_and_a_head(name):
    network = build_network(name, num_classes=7).eval()
    inputs = images(2, 3, 32, 32)
    with torch.no_grad():
        features = network.features(inputs)
        assert features.shape == (2, WIDTHS[name])
        assert network(inputs).shape == (2, 7)
        assert torch.equal(network(inputs), network.head(features))
    convolutions = [each for each in network.modules() if isinstance(each, nn.Conv2d)]
    assert all(each.weight.is_contiguous(memory_format=torch.channels_last) for each in convolutions)
    assert not [each for each in network.modules() if isinstance(each, nn.Dropout)]


def test_digits_cnn_has_the_size_that_the_design_states():
    assert sum(each.numel() for each in digits_network().parameters()) == 33_658


PIECES = {"digits-vit": (1, 64), "digits-clip": (1, 32)}


@pytest.mark.parametrize("name", PIECES)
def test_patch_transformers_attend_over_patches_and_a_class_token(name):
    channels, width = PIECES[name]
    network, inputs = build_network(name, num_classes=10, in_channels=channels).eval(), images(2, 1, 16, 16)
    assert network.features(inputs).shape == (2, width) and network(inputs).shape == (2, 10)
    tower = network.features if name == "digits-vit" else network.features.tower
    cells = torch.cat([inputs[:, :, i : i + 4, j : j + 4].reshape(2, 16) for i in (0, 4, 8, 12) for j in (0, 4, 8, 12)])
    weight, bias = tower.patches.weight.flatten(1), tower.patches.bias
    torch.testing.assert_close(
        tower.patches(inputs).flatten(2).transpose(1, 2),
        (cells @ weight.T + bias).unflatten(0, (16, 2)).transpose(0, 1),
    )
    shuffled = inputs.clone()
    shuffled[:, :, :4], shuffled[:, :, 4:8] = inputs[:, :, 4:8], inputs[:, :, :4]
    assert not torch.allclose(network(inputs), network(shuffled))  # positions matter


def test_the_small_clip_has_unit_features_and_a_frozen_head_without_bias():
    network = build_network("digits-clip", num_classes=10, in_channels=1).eval()
    lengths = network.features(images(3, 1, 16, 16)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((3,), 1 / 0.07))
    assert network.head.bias is None and not network.head.weight.requires_grad
    assert all(each.requires_grad for each in network.features.parameters())


def test_the_small_networks_have_groups_and_dense_layers():
    groups = [
        each.groups for each in build_network("digits-resnext", num_classes=2).modules() if hasattr(each, "groups")
    ]
    assert groups.count(8) == 3
    dense = build_network("digits-densenet", num_classes=2, in_channels=1).features[1]
    outputs = dense(images(2, 16, 8, 8))
    assert outputs.shape[1] == 16 + 3 * 12 and torch.equal(outputs[:, :16], images(2, 16, 8, 8))


def test_initialisation_depends_on_its_seed_alone_and_leaves_global_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = digits_network(seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert same(first.state_dict(), digits_network(seed=1).state_dict())
    other = digits_network(seed=2)
    assert not torch.equal(first.features[0].weight, other.features[0].weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_unknown_names_and_channels_are_refused():
    with pytest.raises(UserError, match="Unknown model 'resnet51'.*did you mean resnet50"):
        build_network("resnet51", num_classes=2)
    with pytest.raises(UserError, match="resnet18 needs images of 3 channels, got 1"):
        build_network("resnet18", num_classes=2, in_channels=1)


# --- BatchNorm ---------------------------------------------------------------------------------------------------


def test_frozen_batchnorm_trains_its_affine_part_and_keeps_its_statistics():
    network = digits_network()
    set_training(network, freeze_batchnorm=True)
    before = snapshot(network)
    network(images(4, 1, 16, 16)).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    after = network.state_dict()
    statistics = [key for key in before if "running" in key or "tracked" in key]
    assert len(statistics) == 9
    assert all(torch.equal(before[key], after[key]) for key in statistics)
    assert all(not torch.equal(before[key], after[key]) for key in ("features.1.weight", "features.1.bias"))
    assert network.training and network.features[0].training


def test_batchnorm_that_is_not_frozen_trains():
    network = digits_network().eval()
    set_training(network, freeze_batchnorm=False)
    before = snapshot(network)
    network(images(4, 1, 16, 16))
    assert not torch.equal(before["features.1.running_mean"], network.features[1].running_mean)


def test_frozen_statistics_uses_the_batchs_and_keeps_the_running_ones():
    network = digits_network().train()
    inputs = images(4, 1, 16, 16)
    expected = copy.deepcopy(network)(inputs)
    before = snapshot(network)
    with frozen_statistics(network):
        found = network(inputs)
    assert torch.equal(found, expected)
    assert same(before, snapshot(network))
    with pytest.raises(ZeroDivisionError), frozen_statistics(network):
        raise ZeroDivisionError
    network(inputs)
    assert network.features[1].num_batches_tracked == 1


def test_frozen_statistics_changes_nothing_in_evaluation_mode():
    network = digits_network().eval()
    inputs = images(4, 1, 16, 16)
    with frozen_statistics(network):
        found = network(inputs)
    assert torch.equal(found, network(inputs))


# --- foreign names -----------------------------------------------------------------------------------------------


def renamed(network, features, head):
    """Return the network's state as another code base would name it."""
    state = {}
    for key, tensor in network.state_dict().items():
        part, _, rest = key.partition(".")
        for prefix in {"features": features, "head": head}[part]:
            state[prefix + rest] = tensor
    return state


NAMINGS = {
    "ours": (["features."], ["head."]),
    "torchvision resnet": ([""], ["fc."]),
    "torchvision mobilenet": ([""], ["classifier.1."]),
    "DomainBed": (["featurizer.network.", "network.0.network."], ["classifier.", "network.1."]),
    "DomainBed, the network alone": (["network.0.network."], ["network.1."]),
    "SWAD's average": (["module.featurizer.network."], ["module.classifier."]),
    "a wrapped average": (["algorithm.module.network.0.network."], ["algorithm.module.network.1."]),
}


@pytest.mark.parametrize("counters", [True, False], ids=["counters", "no counters"])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ["digits-cnn", "resnet18", "mobilenet_v2"])
def test_foreign_names_become_ours(name, naming, counters):
    network = build_network(name, num_classes=3)
    state = renamed(network, *NAMINGS[naming])
    if "average" in naming:
        state["n_averaged"] = torch.tensor(7)
    if not counters:
        state = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    fresh = build_network(name, num_classes=3, seed=1)
    fresh.load_state_dict(fitted(state, fresh.state_dict(), name=name, source=naming), strict=True)
    assert same(network.state_dict(), fresh.state_dict())


# --- foreign files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", [None, "state_dict", "model_dict", "model"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pkl"])
def test_checkpoints_of_tensors_are_read(tmp_path, suffix, nest):
    state = digits_network().state_dict()
    stored = {nest: state, "args": {"lr": 5e-5}, "step": 3} if nest else state
    torch.save(stored, tmp_path / f"model{suffix}")
    assert same(read_foreign(tmp_path / f"model{suffix}"), dict(state))


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "model.pkl"
    torch.save({"args": argparse.Namespace(lr=1), "model_dict": digits_network().state_dict()}, path)
    with pytest.raises(UserError, match=r"runs code, so flatlab refuses; .* torch\.save\(torch\.load\('model\.pkl'"):
        read_foreign(path)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(UserError, match="No file .*nowhere.pth"):
        read_foreign(tmp_path / "nowhere.pth")
    torch.save({"step": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        read_foreign(tmp_path / "empty.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        read_foreign(tmp_path / "broken.safetensors")


def test_weights_replace_the_features_and_leave_the_head(tmp_path):
    source = digits_network(seed=3)
    path = tmp_path / "half.safetensors"
    safetensors.torch.save_file({key: each.half().contiguous() for key, each in source.state_dict().items()}, path)
    network, plain = digits_network(weights=path, seed=4), digits_network(seed=4)
    assert torch.equal(network.features[8].weight, source.features[8].weight.half().float())
    assert network.features[8].weight.dtype == torch.float32
    assert network.features[8].weight.is_contiguous(memory_format=torch.channels_last)
    assert same(network.head.state_dict(), plain.head.state_dict())


def test_weights_that_lack_tensors_are_refused_by_name(tmp_path):
    state = dict(digits_network().state_dict())
    del state["features.5.running_var"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(
        UserError,
        match=r"part\.pth does not fit digits-cnn, which has 18 tensors: 1 missing \(first features\.5",
    ):
        digits_network(weights=tmp_path / "part.pth")


def test_weights_of_another_shape_are_refused(tmp_path):
    torch.save(digits_network().state_dict(), tmp_path / "grey.pth")
    sentence = (
        r"grey\.pth does not fit digits-cnn, which has 18 tensors: 1 of another shape \(first features\.0\.weight, "
        r"shape \(16, 1, 3, 3\) where \(16, 3, 3, 3\) is expected"
    )
    with pytest.raises(UserError, match=sentence):
        build_network("digits-cnn", num_classes=10, in_channels=3, weights=tmp_path / "grey.pth")


@pytest.mark.parametrize("name", ("resnext50_32x4d", "densenet121", "vit_b_16"))
def test_files_with_torchvisions_names_fit(name):
    from torchvision.models import get_model

    with torch.device("meta"):
        expected = build_network(name, num_classes=3).state_dict()
        theirs = get_model(name).state_dict()
    state = {
        re.sub(r"(denselayer\d+\.(norm|conv))([12])\.", r"\1.\3.", key): torch.zeros(each.shape)
        for key, each in theirs.items()
    }
    found = fitted(state, expected, name=name, source="a file", but="head.")
    assert {key: each.shape for key, each in found.items()} == {
        key: each.shape for key, each in expected.items() if not key.startswith("head.")
    }
    first = next(iter(state))
    state[first] = torch.zeros(2, 2)
    with pytest.raises(UserError, match=rf"a file does not fit {name}, .* \(first .*shape \(2, 2\) where "):
        fitted(state, expected, name=name, source="a file", but="head.")


@needs_weights
def test_the_real_weights_load():
    network = build_network("mobilenet_v2", num_classes=7, weights=WEIGHTS, seed=2)
    stored = safetensors.torch.load_file(WEIGHTS)
    assert torch.equal(network.features.features[0][0].weight, stored["features.0.0.weight"].float())
    plain = build_network("mobilenet_v2", num_classes=7, seed=2)
    assert same(network.head.state_dict(), plain.head.state_dict())
    assert torch.isfinite(network.eval()(images(1, 3, 64, 64))).all()


@needs_weights
def test_the_real_weights_do_not_fit_another_architecture():
    sentence = r"does not fit resnet18, which has 120 tensors: 100 missing .*; 260 unexpected \(first features\.0"
    with pytest.raises(UserError, match=sentence):
        build_network("resnet18", num_classes=7, weights=WEIGHTS)


def test_imagenet_weights_come_from_torchvision_or_are_refused_in_a_sentence(monkeypatch):
    with pytest.raises(UserError, match="digits-cnn has no ImageNet weights"):
        digits_network(weights="imagenet")

    from torchvision.models import ResNet18_Weights

    state = build_network("resnet18", num_classes=1000, seed=8).features.state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda *_, **__: state | {"fc.bias": torch.zeros(1000)})
    network = build_network("resnet18", num_classes=7, weights="imagenet")
    assert same(network.features.state_dict(), state)

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(UserError, match="resnet18's weights cannot be downloaded .*no route to host"):
        build_network("resnet18", num_classes=7, weights="imagenet")
