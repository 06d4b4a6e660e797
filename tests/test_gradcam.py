"""GradCAM: class activation maps in closed form, the library's own maps, every architecture, and the numbers."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from stores import refuses
from torch import nn

from flatlab import seeds
from flatlab.metrics.gradcam import ablation, explained_layer, gradcam
from flatlab.models.networks import build_network
from flatlab.quant.attach import attach, bake
from flatlab.results.gradcam import ClassMaps, agreement, energy


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
@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("gradcam", "GradCAM"),
        ("gradcam++", "GradCAMPlusPlus"),
        ("xgradcam", "XGradCAM"),
        ("hirescam", "HiResCAM"),
        ("layercam", "LayerCAM"),
    ],
)
def test_scaled_image_by_image_it_is_what_the_library_shows(method, kind, untouched):
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, inputs = build_network("digits-cnn", num_classes=10, in_channels=1).eval(), random(3, 1, 16, 16)
    with getattr(pytorch_grad_cam, kind)(model, [model.features[10]]) as cam:
        theirs = cam(inputs, [ClassifierOutputTarget(k) for k in (1, 5, 9)])
    model.zero_grad(set_to_none=True)
    with untouched(model):
        found = gradcam(model, inputs, (1, 5, 9), layer="features.10", method=method)
    maps, low, high = found.maps, *(extreme(found.maps, axis=(1, 2), keepdims=True) for extreme in (np.min, np.max))
    assert (maps.max(axis=(1, 2)) > 0).sum() >= 2  # of some images nothing speaks for the class
    np.testing.assert_allclose(
        (maps - low) / np.maximum(high - low, 1e-7), theirs, atol=1e-5
    )  # it also takes the least value as zero
    assert found.method == method and not model.training


def test_an_unknown_method_is_refused():
    refuses(lambda: gradcam(Pooled().eval(), random(1, 2, 8, 8), (0,), method="gradcamm"), "did you mean gradcam")


def test_without_evidence_for_the_class_the_map_is_zero_and_its_numbers_are_nan(untouched):
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
    channels, side = (1, 16) if name.startswith("digits") else (3, 64)
    return build_network(name, num_classes=3, in_channels=channels).eval(), random(2, channels, side, side)


@pytest.mark.parametrize(
    ("name", "layers", "grid"),
    [
        ("digits-cnn", {"features.10"}, (4, 4)),
        ("digits-vit", {"features.blocks.1"}, (4, 4)),  # before the last attention
        ("digits-clip", {"features.tower.blocks.1"}, (4, 4)),
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
        refuses(lambda: gradcam(model, inputs, (0, 7), layer="body"), "classes must be below 3", "got 7")
        refuses(lambda: explained_layer(model, inputs[:1], 7), "classes must be below 3", "got 7")


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


# --- networks of other people --------------------------------------------------------------------------------------


class Stages(nn.Module):
    """Two stages, and what lies behind a layer."""

    def __init__(self, *, shared=False, in_place=False, classes=4):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.a1 = nn.ReLU(inplace=in_place)
        self.a2 = self.a1 if shared else nn.ReLU(inplace=in_place)
        self.head = nn.Linear(8, classes)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(random(*p.shape, name=p.numel()))

    def forward(self, inputs):
        first = nn.functional.max_pool2d(self.a1(self.c1(inputs)), 2)
        return self.head(self.a2(self.c2(first)).mean((2, 3)))


IMAGES = random(3, 3, 16, 16)


def test_of_a_layer_that_runs_twice_the_run_that_was_chosen_is_mapped():
    one, two = Stages(shared=True).eval(), Stages().eval()
    found, own = gradcam(one, IMAGES, (0, 1, 2)), gradcam(two, IMAGES, (0, 1, 2))
    assert (found.layer, own.layer) == ("a1", "a2") and found.grid == own.grid == (8, 8)
    assert own.maps.max() > 0 and np.array_equal(found.maps, own.maps)
    assert np.array_equal(gradcam(one, IMAGES, (0, 1, 2), layer="a1").maps, own.maps)


def test_what_works_in_place_behind_a_layer_does_not_change_its_map():
    plain, in_place = (Stages(in_place=each).eval() for each in (False, True))
    maps = [gradcam(model, IMAGES, (0, 1, 2), layer="c2").maps for model in (plain, in_place)]
    assert maps[0].max() > 0 and np.array_equal(*maps)


class Norm(nn.LayerNorm):
    """As those of other libraries, of a type of its own."""


class TokenBlock(nn.Module):
    """A block as timm writes it: norms of queries and keys are modules of their own."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn.q_norm, self.attn.k_norm, self.attn.attn_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.0)
        self.attn.forward = self.attend
        self.mlp, self.heads = nn.Linear(width, width), heads

    def attend(self, x):
        n, tokens, width = x.shape
        q, k, v = self.attn.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.attn.q_norm(q), self.attn.k_norm(k)
        weights = self.attn.attn_drop((q @ k.mT / width**0.5).softmax(-1))
        return self.attn.proj((weights @ v).mT.reshape(n, width, tokens).mT)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """A ViT in timm's names, with some tokens before the patches; it reads the first one."""

    def __init__(self, prefix):
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, 8, 4, stride=4), nn.Sequential(TokenBlock(8), TokenBlock(8))
        self.prefix, self.norm, self.head = nn.Parameter(random(1, prefix, 8)), Norm(8), nn.Linear(8, 3)

    def forward(self, x):
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.prefix.expand(len(x), -1, -1), patches], dim=1)
        return self.head(self.norm(self.blocks(tokens))[:, 0])


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("sides", [(32, 32), (16, 64)])
def test_of_a_vit_in_timm_s_names_it_is_the_norm_before_the_last_attention(prefix, sides):
    model = Tokens(prefix).eval()
    inputs = random(2, 3, *sides)
    found = gradcam(model, inputs, (0, 2))
    assert found.layer == "blocks.1.norm1" and found.grid == (sides[0] // 4, sides[1] // 4)
    kept = {}
    hook = model.blocks[1].norm1.register_forward_hook(lambda module, _, outputs: kept.update(out=outputs))
    logits = model(inputs)
    hook.remove()
    (slope,) = torch.autograd.grad(logits[0, 0] + logits[1, 2], kept["out"])
    activations, slopes = (t[:, prefix:].mT.unflatten(2, found.grid) for t in (kept["out"], slope))
    by_hand = (slopes.mean((2, 3), keepdim=True) * activations).sum(1, keepdim=True).clamp(min=0)
    shown = nn.functional.interpolate(by_hand.double(), size=sides, mode="bilinear")[:, 0]
    np.testing.assert_allclose(found.maps, shown.detach().numpy(), rtol=1e-4, atol=1e-8)


class Trailing(nn.Module):
    """Channels come last, as in Swin."""

    def __init__(self, width, *, known=True):
        super().__init__()
        self.patches, self.body, self.head = nn.Conv2d(3, width, 4, stride=4), nn.Identity(), nn.Linear(width, 3)
        self.norm = nn.LayerNorm(width) if known else nn.Identity()

    def forward(self, x):
        return self.head(self.norm(self.body(self.patches(x).permute(0, 2, 3, 1))).tanh().mean((1, 2)))


def test_channels_that_come_last_are_seen_or_refused():
    inputs = random(2, 3, 32, 32)
    model = Trailing(12).eval()
    found = gradcam(model, inputs, (0, 2))
    assert found.layer == "norm" and found.grid == (8, 8)
    first = model.norm(model.patches(inputs).permute(0, 2, 3, 1)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.head(first.tanh().mean((1, 2)))[[0, 1], [0, 2]].sum(), first)
    by_hand = (slope.mean((1, 2), keepdim=True) * first).sum(3).clamp(min=0)[:, None].double()
    shown = nn.functional.interpolate(by_hand, size=(32, 32), mode="bilinear")[:, 0]
    np.testing.assert_allclose(found.maps, shown.detach().numpy(), rtol=1e-4, atol=1e-8)
    refuses(lambda: gradcam(Trailing(8).eval(), inputs, (0, 2), layer="body"), "(2, 8, 8, 8)", "not clearly")
    refuses(
        lambda: gradcam(Trailing(12, known=False).eval(), inputs, (0, 2), layer="body"), "(2, 8, 8, 12)", "not clearly"
    )
    assert gradcam(Trailing(12).eval(), inputs, (0, 2), layer="body", grid=(8, 8)).grid == (8, 8)


class Returning(Stages):
    """Returns its logits in some form."""

    def __init__(self, form, **given):
        super().__init__(**given)
        self.form = form

    def forward(self, inputs):
        return self.form(super().forward(inputs))


@dataclass
class Output:
    """What the models of some libraries return."""

    loss: None
    logits: torch.Tensor


def test_logits_are_found_in_what_a_model_returns():
    plain = gradcam(Stages().eval(), IMAGES, (0, 1, 2)).maps
    for form in (lambda z: (z, None), lambda z: {"logits": z}, lambda z: Output(None, z)):
        assert np.array_equal(gradcam(Returning(form).eval(), IMAGES, (0, 1, 2)).maps, plain)
    refuses(lambda: gradcam(Returning(lambda z: z[..., None]).eval(), IMAGES, (0, 1, 2)), "got shape (1, 4, 1)")
    refuses(lambda: gradcam(Returning(lambda z: {"x": z}).eval(), IMAGES, (0, 1, 2)), "logits (N, num_classes)")


def test_one_logit_is_evidence_for_both_classes():
    one, two = Stages(classes=1).eval(), Stages(classes=2).eval()
    with torch.no_grad():
        two.head.weight.copy_(torch.cat([-one.head.weight, one.head.weight]))
        two.head.bias.copy_(torch.cat([-one.head.bias, one.head.bias]))
    found, maps = gradcam(one, IMAGES, (1, 0, 1)), gradcam(two, IMAGES, (1, 0, 1)).maps
    np.testing.assert_allclose(found.maps, maps, rtol=1e-6)
    flat = gradcam(Returning(lambda z: z[:, 0], classes=1).eval(), IMAGES, (1, 0, 1)).maps
    np.testing.assert_allclose(flat, maps, rtol=1e-6)
    refuses(lambda: gradcam(one, IMAGES, (1, 0, 2)), "classes must be below 2")
    whole = ablation(one, IMAGES, found, num_shares=2)[0][:, 0]
    z = one(IMAGES)[:, 0].detach().double()
    assert whole == pytest.approx(torch.sigmoid(torch.where(torch.tensor([True, False, True]), z, -z)).numpy())


class Paired(nn.Module):
    """Its layer returns a tuple, as attentions do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Module(), nn.Linear(8, 4)
        self.body.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.body.forward = lambda x: (self.body.conv(x), None)

    def forward(self, x):
        return self.head(self.body(x)[0].relu().mean((2, 3)))


def test_a_layer_that_returns_a_tuple_and_bfloat16_work():
    model = Paired().eval()
    own = gradcam(model, IMAGES, (0, 1, 2), layer="body.conv").maps
    assert np.array_equal(gradcam(model, IMAGES, (0, 1, 2), layer="body").maps, own)
    narrow = gradcam(Paired().eval().bfloat16(), IMAGES.bfloat16(), (0, 1, 2)).maps
    assert narrow.dtype == np.float64 and np.isfinite(narrow).all()


@pytest.mark.parametrize(
    ("classes", "words"),
    [((0,), "one class for each image, got 1 for 3"), ((0, 1, -1), "integer >= 0, got -1"), ((0, 1, 1.5), "got 1.5")],
)
def test_classes_that_are_none_are_refused(classes, words):
    refuses(lambda: gradcam(Stages().eval(), IMAGES, classes), words)


def test_a_layer_that_the_logits_do_not_see_is_refused():
    model = Stages().eval()
    model.spare = nn.Conv2d(3, 2, 3).eval()
    refuses(lambda: gradcam(model, IMAGES, (0, 1, 2), layer="spare"), "'spare' does not run")
    refuses(lambda: gradcam(model, IMAGES[0], (0, 1, 2)), "inputs must be images (N, C, H, W)")


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
