"""CLIP of `transformers` (extra `transformers`): its image tower, and class vectors from its text tower.

The rows of the head are frozen unit vectors, one for each class: the embedding of the text "a photo of a NAME."
(zero-shot classification, Radford et al. 2021). The image tower is trained.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatlab.errors import UserError, reason
from flatlab.models.foreign import impossible, misfit

PROMPT = "a photo of a {}."
OURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std by which photographs are normalised (data/load.py)
CLIPS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and std that CLIP expects
BUFFERS = "position_ids"  # in older checkpoints


class ImageTower(nn.Module):
    """CLIP's image tower: from normalised images (N, 3, H, W) to unit vectors times exp(logit_scale) (N, width).

    Args:
        model: a CLIPModel; its image tower, projection and logit_scale are used.
    """

    logit_scale: Tensor
    shift: Tensor
    factor: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.side: int = model.config.vision_config.image_size
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.register_buffer("logit_scale", model.logit_scale.detach().clone())
        (mean, std), (own_mean, own_std) = (tuple(map(torch.tensor, each)) for each in (OURS, CLIPS))
        self.register_buffer("factor", (std / own_std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - own_mean) / own_std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, width); their inner products with the class vectors are CLIP's logits."""
        seen = self.vision_model(pixel_values=images * self.factor + self.shift).pooler_output
        return self.logit_scale.exp() * nn.functional.normalize(self.visual_projection(seen), dim=-1)


def image_tower(config: str, channels: int) -> tuple[ImageTower, int]:
    """Return a randomly initialised image tower, and the width of its features.

    Args:
        config: the text of config.json.
        channels: channels of the images; must be 3.

    Raises:
        UserError: the configuration is not CLIP's, or `channels` is not 3.
    """
    if channels != 3:
        raise UserError(f"CLIP needs images of 3 channels, got {channels}.")
    model = _whole(config)
    return ImageTower(model), model.config.projection_dim


def load(tower: ImageTower, state: Mapping[str, Tensor], *, name: str, source: str) -> None:
    """Load the image tower from a checkpoint.

    Args:
        tower: receives the weights.
        state: the file's tensors, by the names of transformers.
        name: the network's name, for errors.
        source: the file's name, for errors.

    Raises:
        UserError: a tensor is missing, unexpected, or of another shape, or its values are impossible; the first one is
            named.
    """
    _fill(tower, state, ("vision_model.", "visual_projection.", "logit_scale"), name=name, source=source)


def class_vectors(tokenizer: Any, config: str, state: Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """Return the unit vectors that the text tower gives the classes, shape (num_classes, width).

    Args:
        tokenizer: the tokenizer that transformers saved with the model.
        config: the text of config.json.
        state: the tensors of a checkpoint, those of the text tower among them.
        classes: the names of the classes; an underscore is replaced by a space.

    Raises:
        UserError: the tokenizer or the weights do not fit the configuration.
    """
    model, folder = _whole(config), str(tokenizer.name_or_path)
    parts = nn.ModuleDict({part: getattr(model, part) for part in ("text_model", "text_projection")})
    _fill(parts, state, ("text_model.", "text_projection."), name="the text tower", source=folder)
    prompts = [PROMPT.format(name.replace("_", " ")) for name in classes]
    longest = model.config.text_config.max_position_embeddings
    given = tokenizer(prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    if (largest := int(given["input_ids"].max())) >= (rows := model.config.text_config.vocab_size):
        raise UserError(
            f"The tokenizer in {folder} does not fit the model: it gives the number {largest}, and the embedding has "
            f"{rows} rows."
        )
    with torch.no_grad():
        found = model.text_model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).pooler_output
        return nn.functional.normalize(model.text_projection(found), dim=-1)


def _whole(config: str) -> Any:
    from transformers import CLIPConfig, CLIPModel

    given = json.loads(config)
    if given.pop("model_type") != "clip":
        raise UserError("--model clip:PATH needs a folder whose config.json has the model_type clip.")
    try:
        return CLIPModel(CLIPConfig(**given)).eval()
    except Exception as error:  # of several types, among them those of its own validation
        raise UserError(f"transformers refuses the model's config.json: {reason(error)}") from error


def _fill(module: nn.Module, state: Mapping[str, Tensor], parts: tuple[str, ...], *, name: str, source: str) -> None:
    given = {key: each for key, each in state.items() if key.startswith(parts) and not key.endswith(BUFFERS)}
    expected = module.state_dict()
    if fault := misfit({key: key for key in given}, given, expected):
        raise UserError(f"{source} does not fit {name}, which has {len(expected)} tensors: {fault}.")
    for key, each in given.items():
        if fault := impossible(each, key):
            raise UserError(f"{source}: {key} {fault}.")
    module.load_state_dict(given)
