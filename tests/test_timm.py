"""Networks of timm: DeiT-S by shape and key, its quantized layers and its class activation maps; nothing is loaded."""

import commandline
import pytest
import timm
import torch

from flatlab.errors import UserError
from flatlab.metrics.gradcam import gradcam
from flatlab.models.networks import build_network
from flatlab.quant.attach import layers

DEIT = "timm:deit_small_patch16_224"
SHAPES = {  # of deit_small_patch16_224-cd65a155.pth, by its own names: 12 blocks of 12 tensors, and 8 more
    "cls_token": (1, 1, 384),
    "pos_embed": (1, 197, 384),
    "patch_embed.proj.weight": (384, 3, 16, 16),
    "patch_embed.proj.bias": (384,),
    "norm.weight": (384,),
    "norm.bias": (384,),
    "head.weight": (1000, 384),
    "head.bias": (1000,),
}
BLOCK = {
    **{f"{norm}.{each}": (384,) for norm in ("norm1", "norm2") for each in ("weight", "bias")},
    **{"attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,), "attn.proj.weight": (384, 384)},
    **{"attn.proj.bias": (384,), "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,)},
    **{"mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,)},
}
SHAPES |= {f"blocks.{block}.{name}": shape for block in range(12) for name, shape in BLOCK.items()}


@pytest.mark.slow
def test_deit_s_takes_the_published_file_and_is_quantized_and_explained(tmp_path):
    state = {name: 0.02 * torch.randn(shape) for name, shape in SHAPES.items()}
    torch.save({"model": state}, tmp_path / "deit.pth")
    deit = build_network(DEIT, num_classes=7, weights=tmp_path / "deit.pth").eval()
    loaded = {name.removeprefix("features."): each for name, each in deit.state_dict().items()}
    assert loaded.keys() == SHAPES.keys() and len(loaded) == 152
    assert all(torch.equal(loaded[name], state[name]) for name in SHAPES if not name.startswith("head."))
    assert deit.head.weight.shape == (7, 384)
    names = [f"blocks.{i}.{each}" for i in range(12) for each in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert list(layers(deit)) == [f"features.{name}" for name in ("patch_embed.proj", *names)]
    maps = gradcam(deit, torch.randn(2, 3, 224, 224), [0, 3])
    assert (maps.layer, maps.grid) == ("features.blocks.11.norm1", (14, 14))
    del state["blocks.3.mlp.fc2.bias"]
    torch.save({"model": state}, tmp_path / "deit.pth")
    with pytest.raises(UserError, match=rf"deit.pth does not fit {DEIT}.*1 missing \(first features.blocks.3.mlp.fc"):
        build_network(DEIT, num_classes=7, weights=tmp_path / "deit.pth")


def test_a_convolutional_network_and_its_draws():
    net = build_network("timm:test_resnet", num_classes=3, in_channels=1).eval()
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    again = build_network("timm:test_resnet", num_classes=3, in_channels=1)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_mistakes_are_refused(monkeypatch, capsys, tmp_path):
    with pytest.raises(UserError, match=r"timm has no network 'deit_small'; near are deit_small_distilled_patch16_224"):
        build_network("timm:deit_small", num_classes=2)
    store = ("--store", tmp_path / "runs")
    assert commandline.call("train", "--model", DEIT, *store) == 2
    assert "takes images of 3 channels, and digits have 1" in capsys.readouterr().err
    tree = commandline.pets(tmp_path / "pets")
    photographs = ("--dataset", f"folder:{tree}", *commandline.PETS[:2], "--image-size", "32", "--seeds", "1", *store)
    assert commandline.call("train", "--model", "timm:test_vit", "--weights", "none", *photographs) == 2
    assert "timm:test_vit takes images of 160 pixels, got 32: write --image-size 160" in capsys.readouterr().err

    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"timm cannot load test_vit \(no route\); name a file of its weights instead"):
        build_network("timm:test_vit", num_classes=2, weights="imagenet")
