"""Which weights are quantized: attention, patches, embeddings by row, first layer and head; and the true size."""

import copy

import pytest
import torch
from commandline import call
from torch import nn
from torchvision.models import VisionTransformer

from flatlab.loading import network as loading_network
from flatlab.loading.export import export, load_exported
from flatlab.models.networks import Network, build_network
from flatlab.quant.attach import attach, bake, layers, quantized_layers
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.quantizers import QuantSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore
from flatlab.train.loop import train

BLOCKS = [f"features.blocks.{block}.{each}" for block in (0, 1) for each in ("qkv", "proj", "fc1", "fc2")]
PLACE = Place(device="cpu")


def quantized(model, channels, **fields):
    """Return a network as a run's spec quantizes it."""
    network = build_network(model, num_classes=2, in_channels=channels)
    spec = compose(METHODS["QT-DoG"], SMOKE, held_out="rot0", seed=0, trial_seed=0)
    loading_network.quantize(network, spec.replace(quantizer=QuantSpec(**fields)))
    return network


RULES = {
    "usual": ({}, BLOCKS),
    "embeddings": ({"embeddings": True}, [*BLOCKS, "features.embedding"]),
    "first": ({"skip_first": True}, BLOCKS[1:]),
    "head": ({"head": True}, [*BLOCKS, "head"]),
    "all": ({"embeddings": True, "head": True, "skip_first": True}, [*BLOCKS[1:], "head", "features.embedding"]),
}


@pytest.mark.parametrize(("fields", "names"), RULES.values(), ids=RULES)
def test_the_rules_name_the_layers_of_a_transformer(fields, names):
    assert list(quantized_layers(quantized("sentences-transformer", 48, **fields))) == names


def test_of_a_vision_transformer_patches_fused_qkv_and_mlps_are_quantized():
    names = [f"features.blocks.{block}.{each}" for block in (0, 1, 2) for each in ("qkv", "proj", "fc1", "fc2")]
    assert list(quantized_layers(quantized("digits-vit", 1))) == ["features.patches", *names]
    assert list(quantized_layers(quantized("digits-vit", 1, skip_first=True))) == names


def test_of_torchvisions_vit_attention_is_quantized_by_its_joint_projection():
    found = layers(Network(VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=3), nn.Linear(3, 2)))
    assert [name.removeprefix("features.encoder.layers.encoder_layer_0.") for name in found][:5] == [
        *("features.conv_proj", "self_attention", "self_attention.out_proj", "mlp.0", "mlp.3")
    ]
    assert len(found) == 1 + 2 * 4 + 1  # torchvision's own head is one of the features here


def test_each_row_of_an_embedding_has_a_step_size_and_lies_on_its_grid():
    network = quantized("sentences-transformer", 48, embeddings=True, bits=3)
    layer, quantizer = quantized_layers(network)["features.embedding"]
    assert quantizer.scale.shape == (4096, 1)
    codes = layer.weight / quantizer.scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.round().min() >= -4 and codes.round().max() <= 3
    pieces = torch.tensor([[2, 5, 9, 0]])
    loss = network(pieces).square().sum()
    loss.backward()
    moved = quantizer.scale.grad.squeeze(1).nonzero().flatten().tolist()
    assert set(moved) <= {0, 2, 5, 9} and {2, 5, 9} & set(moved)  # the rows of the sentence's pieces alone
    before = network(pieces)
    bake(network)
    assert torch.equal(network(pieces), before)


class Tied(nn.Module):
    """An embedding that a linear map shares."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.back = nn.Linear(4, 7, bias=False)
        self.back.weight = self.embedding.weight

    def forward(self, pieces):
        return self.back(self.embedding(pieces)).mean(1)


@pytest.mark.parametrize("embeddings", (False, True))
def test_a_tied_embedding_is_quantized_once_by_the_linear_maps_name(embeddings):
    network = Network(Tied(), nn.Linear(7, 2))
    assert attach(network, embeddings=embeddings) == ["features.back"] == list(quantized_layers(network))
    assert torch.equal(network.features.embedding.weight, network.features.back.weight)
    copied = copy.deepcopy(network)
    bake(copied)
    assert torch.equal(copied(torch.tensor([[1, 2]])), network(torch.tensor([[1, 2]])))


def test_an_export_says_what_embeddings_weigh(tmp_path):
    text = {"dataset": "sentences", "held_out": "nyt", "image_size": 8, "model": "sentences-transformer", "steps": 1}
    text |= {"eval_every": 1, "lr": 1e-3, "batch_size": 4, "switch": 0, "target_logged": False}
    factors = []
    for fields in ({}, {"embeddings": True, "head": True}):
        run = RunStore(tmp_path).run(RunSpec(**text, quantizer=QuantSpec(**fields)))
        train([run.spec], RunStore(tmp_path), PLACE)
        told = export(run, tmp_path / "file.safetensors", PLACE)
        loaded, pieces = load_exported(tmp_path / "file.safetensors"), torch.tensor([[2, 5, 9, 0]])
        assert torch.isfinite(loaded(pieces)).all() and told.nominal == pytest.approx(32 / 7)
        factors.append(told.compression)
    assert factors[0] < 1.3 and 3.5 < factors[1] < 32 / 7  # embeddings are 79 % of the numbers


@pytest.mark.parametrize("option", ("--embeddings", "--skip-first", "--head"))
def test_the_options_need_lsq(option, tmp_path, capsys):
    words = ("train", "--setting", "smoke", "--held-out", "rot0", "--store", tmp_path)
    assert call(*words, option) == 2
    assert f"{option} does nothing without LSQ; add --quantizer lsq, or leave it out." in " ".join(
        capsys.readouterr().err.split()
    )
    assert call(*words, option, "--method", "qt-dog", "--dry-run") == 0
