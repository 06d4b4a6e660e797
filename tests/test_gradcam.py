"""GradCAM: class activation maps in closed form, the library's own maps, every architecture, and the numbers."""

import warnings

import numpy as np
import pytest
import torch
from stores import refuses
from torch import nn

from flatlab import seeds
from flatlab.metrics.gradcam import ClassMaps, ablation, explained_layer, gradcam
from flatlab.metrics.maps import agreement, energy
from flatlab.models import build_network
from flatlab.quant.attach import attach, bake


def random(*shape, name="gradcam"):
    return torch.randn(shape, generator=seeds.generator(name, *shape))


class Pooled(nn.Module):
    """Convolutions, a mean over the grid, a linear head: GradCAM is its class activation map."""

    def __init__(self, bias=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(random(*p.shape, name=p.numel()) + bias)

    def forward(self, inputs):
        return self.head(self.body(inputs).mean((2, 3)))


def test_before_a_mean_and_a_linear_head_it_is_the_class_activation_map(untouched):
    model, inputs, classes = Pooled().double().eval(), random(4, 2, 8, 8).double(), (2, 0, 1, 1)
    with untouched(model):
        found = gradcam(model, inputs, classes, layer="body")
    with torch.no_grad():
        features = model.body(inputs)
        by_hand = torch.einsum("nc,nchw->nhw", model.head.weight[list(classes)], features).clamp(min=0) / 16
    shown = nn.functional.interpolate(by_hand[:, None], size=(8, 8), mode="bilinear")[:, 0]
    np.testing.assert_allclose(found.maps, shown.numpy(), rtol=1e-5, atol=1e-7)
    assert found.grid == (4, 4) and found.classes == classes and (found.maps >= 0).all()
    assert found.scaled().max(axis=(1, 2)) == pytest.approx(1) and found.maps.max() != pytest.approx(1)


@pytest.mark.oracle
def test_scaled_image_by_image_it_is_what_the_library_shows():
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, inputs = build_network("digits-cnn", num_classes=10, in_channels=1).eval(), random(3, 1, 16, 16)
    with GradCAM(model, [model.features[10]]) as cam:
        theirs = cam(inputs, [ClassifierOutputTarget(k) for k in (1, 5, 9)])
    model.zero_grad(set_to_none=True)
    maps = gradcam(model, inputs, (1, 5, 9), layer="features.10").maps
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    assert (maps.max(axis=(1, 2)) > 0).sum() >= 2  # of some images nothing speaks for the class
    np.testing.assert_allclose(
        (maps - low) / np.maximum(high - low, 1e-7), theirs, atol=1e-5
    )  # it also takes the least value as zero


def test_where_nothing_speaks_for_the_class_the_map_is_zero_and_no_number_is_made_up(untouched):
    model, inputs = Pooled().eval(), random(2, 2, 8, 8)
    with torch.no_grad():
        model.head.weight[1].zero_()
    with untouched(model):
        found = gradcam(model, inputs, (1, 1), layer="body")
    assert not found.maps.any() and not found.scaled().any()
    assert np.isnan(energy(found.maps, np.ones((2, 8, 8)))).all() and np.isnan(agreement(found.maps, found.maps)).all()


def vit(classifier="token"):
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(32, 8, 2, 2, 12, 24, num_classes=3)
        nn.init.normal_(model.heads.head.weight)
    return model.eval()


def own(name):
    channels, side = (1, 16) if name == "digits-cnn" else (3, 64)
    return build_network(name, num_classes=3, in_channels=channels).eval(), random(2, channels, side, side)


@pytest.mark.parametrize(
    ("name", "layers", "grid"),
    [
        ("digits-cnn", {"features.10"}, (4, 4)),
        ("resnet18", {"features.layer4", "features.layer4.1"}, (2, 2)),
        ("resnet50", {"features.layer4", "features.layer4.2"}, (2, 2)),
        ("mobilenet_v2", {"features.features", "features.features.18"}, (2, 2)),
    ],
)
def test_the_layer_is_found_in_our_networks(name, layers, grid, untouched):
    model, inputs = own(name)
    with untouched(model):
        found = gradcam(model, inputs, (0, 2))
    assert found.layer in layers and found.grid == grid
    for layer in layers:
        np.testing.assert_array_equal(gradcam(model, inputs, (0, 2), layer=layer).maps, found.maps)


def test_of_a_vit_it_is_the_norm_before_the_last_attention(untouched):
    model, inputs = vit(), random(2, 3, 32, 32)
    with untouched(model):
        found = gradcam(model, inputs, (0, 2))
    assert found.layer == "encoder.layers.encoder_layer_1.ln_1" and found.grid == (4, 4)  # 16 patches and a class token
    assert found.maps.shape == (2, 32, 32)
    given = gradcam(model, inputs, (0, 2), layer=found.layer, grid=(2, 8))
    assert given.grid == (2, 8) and not np.allclose(given.maps, found.maps)


def test_hooks_are_gone_and_gradients_as_they_were_after_a_failure(untouched):
    model, inputs = Pooled().eval(), random(2, 2, 8, 8)
    model(inputs).sum().backward()
    model.head.bias.requires_grad_(False)
    with untouched(model):
        gradcam(model, inputs, (0, 1))
        with pytest.raises(IndexError):
            gradcam(model, inputs, (0, 7), layer="body")
        with pytest.raises(IndexError):
            explained_layer(model, inputs[:1], 7)


def test_a_baked_network_gives_the_maps_of_the_quantized_one():
    model, inputs = own("digits-cnn")
    attach(model, bits=4)
    before = gradcam(model, inputs, (0, 2))
    bake(model)
    np.testing.assert_allclose(gradcam(model, inputs, (0, 2)).maps, before.maps, rtol=1e-6)


def test_mistakes_are_sentences():
    model, inputs = Pooled().eval(), random(1, 2, 8, 8)
    refuses(lambda: gradcam(model, inputs, (0,), layer="boddy"), "no layer 'boddy'", "named_modules")
    refuses(lambda: gradcam(model, inputs, (0,), layer="head"), "(1, 3)", "name another layer")
    refuses(lambda: gradcam(model.train(), inputs, (0,)), "eval mode")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(128, 3)).eval()
    refuses(lambda: gradcam(flat, inputs, (0,)), "No layer", "layer=")


# --- numbers -----------------------------------------------------------------------------------------------------


class Bright(nn.Module):
    """The logit of class 1 is the sum of the pixels."""

    def forward(self, inputs):
        total = inputs.sum((1, 2, 3))
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_pixels_go_and_come_in_the_order_of_the_map():
    values = torch.arange(1.0, 5.0).reshape(1, 1, 2, 2)
    right = ClassMaps(values[0].double().numpy(), (1,), "by hand", (2, 2))
    wrong = ClassMaps(-values[0].double().numpy() + 9, (1,), "by hand", (2, 2))
    sigmoid = lambda totals: [1 / (1 + np.exp(-t)) for t in totals]  # noqa: E731
    deleted, inserted = ablation(Bright().eval(), values, right, num_shares=4)
    np.testing.assert_allclose(deleted[0], sigmoid([10, 6, 3, 1, 0]), rtol=1e-6)
    np.testing.assert_allclose(inserted[0], sigmoid([0, 4, 7, 9, 10]), rtol=1e-6)
    deleted, inserted = ablation(Bright().eval(), values, wrong, num_shares=4)
    np.testing.assert_allclose(deleted[0], sigmoid([10, 9, 7, 4, 0]), rtol=1e-6)
    filled, _ = ablation(Bright().eval(), values, right, num_shares=2, fill=-1.0)
    np.testing.assert_allclose(filled[0], sigmoid([10, 1, -4]), rtol=1e-6)


def test_energy_and_agreement_by_hand():
    maps = np.array([[[1.0, 3.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    mask = np.array([[[1, 0], [0, 1]], [[1, 1], [1, 0]]])
    assert energy(maps, mask).tolist() == [5 / 8, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others = np.stack([2 * maps[0] + 1, 5 - maps[1]])
        assert agreement(maps, others).tolist() == pytest.approx([1, -1])
    both = agreement(maps[:1], maps[1:])
    assert both == pytest.approx(np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1])
