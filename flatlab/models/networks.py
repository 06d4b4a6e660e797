"""Networks by name: features that end in a flat vector, and a linear head."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatlab.errors import UserError, choose
from flatlab.models import classifiers, clip, small
from flatlab.models.foreign import fitted, read_foreign
from flatlab.models.transformer import sentences_transformer
from flatlab.seeds import seeded

LOG = logging.getLogger("flatlab")


class Network(nn.Module):
    """A classifier in two parts: `features` maps images or token ids to (N, width), a linear `head` to the logits."""

    def __init__(self, features: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.features = features
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits, shape (N, num_classes)."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class Ensemble(nn.Module):
    """An ensemble: the mean of the logits, or the logarithm of the mean of the probabilities."""

    def __init__(self, members: Iterable[nn.Module], *, combine: str = "logits") -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combine = combine

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (N, num_classes): mean logits (QT-DoG Eq. 6), or the logarithm of the members' mean probabilities."""
        logits = torch.stack([member(inputs) for member in self.members])
        if self.combine == "logits":
            return logits.mean(0)
        return logits.log_softmax(-1).logsumexp(0) - math.log(len(self.members))


def build_network(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    weights: str | Path = "none",
    seed: int = 0,
    config: str | None = None,
) -> Network:
    """Return a network in channels-last memory (its convolutions are 2.3 times as fast on a CPU).

    Args:
        name: one of `MODELS`, "timm:NAME", or the name of a model saved by transformers ("hf:...", "clip:...").
        num_classes: outputs of the head, whose initial values depend on `seed` and not on `weights`.
        in_channels: channels of the images (torchvision's networks need 3), or tokens of a sentence.
        weights: "none", "imagenet" (torchvision downloads IMAGENET1K_V1, as in the paper; timm its own), or a file. The
            head of a file is loaded only for "hf:...", if it has `num_classes` outputs.
        seed: seed of the initialisation; the global random generators are not changed.
        config: the text of config.json, for a model saved by transformers.

    Raises:
        UserError: an unknown name, inputs or weights that do not fit the network, or a package that is not installed.
    """
    name = name if config is not None or name.startswith("timm:") else choose("model", name, MODELS)
    aligned = name in ALIGNED or name.startswith("clip:")
    with seeded("init", seed):
        features, width = _builder(name, config)(in_channels)
        network = Network(features, nn.Linear(width, num_classes, bias=not aligned))
    network.head.requires_grad_(not aligned)
    if weights == "imagenet":
        _load_features(network, _imagenet(name, in_channels), name=name, source="the downloaded file")
    elif weights != "none" and isinstance(features, classifiers.Sentences):
        drawn = classifiers.load(features, network.head, read_foreign(Path(weights)), name=name, source=str(weights))
        if drawn:
            LOG.warning(
                "%s: %s is drawn from the seed, since the file has none for %d classes.",
                *(weights, ", ".join(drawn), num_classes),
            )
    elif weights != "none" and isinstance(features, clip.ImageTower):
        clip.load(features, read_foreign(Path(weights)), name=name, source=str(weights))
    elif weights != "none":
        _load_features(network, read_foreign(Path(weights)), name=name, source=str(weights))
    return network.to(memory_format=torch.channels_last)


def _builder(name: str, config: str | None) -> Callable[[int], tuple[nn.Module, int]]:
    if config is not None and name.startswith("clip:"):
        return partial(clip.image_tower, config)
    if config is not None:
        return partial(classifiers.classifier, config)
    kind, _, own = name.partition(":")
    return _timm(own) if kind == "timm" else MODELS[name]


def set_training(network: nn.Module, *, freeze_batchnorm: bool) -> None:
    """Set training mode; frozen BatchNorm stays in eval mode, and its weight and bias are trained (khanrc/swad)."""
    network.train()
    if freeze_batchnorm:
        for layer in batchnorms(network):
            layer.eval()


@contextmanager
def frozen_statistics(network: nn.Module) -> Iterator[None]:
    """Make BatchNorm in training mode use batch statistics without updating its running statistics.

    Used in the second pass of SAM, whose activations are those of the perturbed weights.
    """
    tracking = [(layer, layer.track_running_stats) for layer in batchnorms(network)]
    try:
        for layer, _ in tracking:
            layer.track_running_stats = False
        yield
    finally:
        for layer, tracked in tracking:
            layer.track_running_stats = tracked


def _imagenet(name: str, in_channels: int) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights, list_models

    if name.startswith("timm:"):
        features, _ = _timm(name.removeprefix("timm:"), pretrained=True)(in_channels)
        return features.state_dict()
    if name not in list_models():
        raise UserError(f'{name} has no ImageNet weights; write weights="none"')
    try:
        weights = get_model_weights(name)["IMAGENET1K_V1"]
        state: dict[str, Tensor] = weights.get_state_dict(check_hash=True, weights_only=True)
    except (URLError, TimeoutError) as error:
        raise UserError(f"{name}'s weights cannot be downloaded ({error}); name a file of them instead") from error
    return state


def _load_features(network: Network, state: Mapping[str, Tensor], *, name: str, source: str) -> None:
    given = fitted(state, network.state_dict(), name=name, source=source, but="head.")
    network.load_state_dict(given, strict=False)  # what is absent is the head, and counters; copying casts fp16 to fp32


def side_of(network: Network) -> int | None:
    """Return the side of the images (pixels) that a network of timm or CLIP requires; None if it accepts any."""
    if isinstance(network.features, clip.ImageTower):
        return network.features.side
    patches = getattr(network.features, "patch_embed", None)
    size: tuple[int, int] | None = getattr(patches, "img_size", None)
    return size[0] if size else None


def batchnorms(network: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of a network."""
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]


def _cnn(width: int, depth: int) -> Callable[[int], tuple[nn.Module, int]]:
    """Return a builder of `depth` convolutions: `width` channels in the first, doubled after each pooling."""

    def build(in_channels: int) -> tuple[nn.Module, int]:
        widths = (in_channels, *(width * 2**level for level in range(depth)))
        layers: list[nn.Module] = []
        for level, (wide, wider) in enumerate(itertools.pairwise(widths)):
            if level:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.Conv2d(wide, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
        # Flattened, not averaged over space: position matters to digits, and held-out accuracy is 10 to 30 points
        # higher.
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten()), 16 * widths[-1]

    return build


def _torchvision(name: str, last: str, width: int) -> Callable[[int], tuple[nn.Module, int]]:
    """Return a builder of torchvision's network whose `last` submodule is replaced by the identity."""

    def build(in_channels: int) -> tuple[nn.Module, int]:
        from torchvision import models  # takes seconds

        if in_channels != 3:
            raise UserError(f"{name} needs images of 3 channels, got {in_channels}")
        features = models.get_model(name, weights=None)
        setattr(features, last, nn.Identity())
        return features, width

    return build


def _timm(name: str, *, pretrained: bool = False) -> Callable[[int], tuple[nn.Module, int]]:
    """Return a builder of a network of timm (extra `timm`) without its head, with random or pretrained weights."""

    def build(in_channels: int) -> tuple[nn.Module, int]:
        if find_spec("timm") is None:
            raise UserError("--model timm:NAME needs a package that is not installed: pip install 'flatlab[timm]'.")
        import timm

        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name}*")[:5])
            raise UserError(f"timm has no network {name!r}{f'; near are {near}' if near else ''}.")
        try:
            features: Any = timm.create_model(name, pretrained, num_classes=0, in_chans=in_channels)
        except Exception as error:  # of several libraries for downloads
            raise UserError(f"timm cannot load {name} ({error}); name a file of its weights instead.") from error
        return features, features.num_features

    return build


CNNS = {  # the grids of `reproduce qgen`: widths 10 and 16 for digits (5,160 to 33,658 parameters), others for PAPER
    f"cnn-{width}x{depth}": (width, depth)
    for width, depth in (*itertools.product((10, 16), (2, 3)), *itertools.product((16, 32, 64), (4, 5)))
}

ALIGNED = ("digits-clip",)  # their heads are frozen class vectors, from a text tower (`train/objectives.py`)

STAGES = {  # where MixStyle is applied: the ends of all stages but the last (of ResNets conv2_x to conv4_x, as SWAD's)
    "digits-cnn": ("features.2", "features.6"),
    "resnet18": ("features.layer1", "features.layer2", "features.layer3"),
    "resnet50": ("features.layer1", "features.layer2", "features.layer3"),
    "resnext50_32x4d": ("features.layer1", "features.layer2", "features.layer3"),
    "densenet121": ("features.features.transition1", "features.features.transition2", "features.features.transition3"),
    "mobilenet_v2": ("features.features.3", "features.features.6", "features.features.13"),
    "digits-resnext": ("features.3", "features.4"),
    "digits-densenet": ("features.5", "features.10"),  # behind the pooling
    **{name: tuple(f"features.{4 * level + 2}" for level in range(depth - 1)) for name, (_, depth) in CNNS.items()},
}

MODELS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "digits-cnn": _cnn(16, 3),  # 33,658 parameters with ten classes; made for 1 x 16 x 16 images
    "digits-vit": small.vit,
    "digits-resnext": small.resnext,
    "digits-densenet": small.densenet,
    "digits-clip": small.clip,
    "resnet18": _torchvision("resnet18", "fc", 512),
    "resnet50": _torchvision("resnet50", "fc", 2048),
    "resnext50_32x4d": _torchvision("resnext50_32x4d", "fc", 2048),
    "densenet121": _torchvision("densenet121", "classifier", 1024),
    "vit_b_16": _torchvision("vit_b_16", "heads", 768),
    "mobilenet_v2": _torchvision("mobilenet_v2", "classifier", 1280),  # its dropout goes with the classifier
    "sentences-transformer": sentences_transformer,  # 332,418 parameters with two classes and 48 pieces
    **{name: _cnn(*shape) for name, shape in CNNS.items()},
}
