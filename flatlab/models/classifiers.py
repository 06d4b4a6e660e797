"""Sequence classifiers of `transformers` (extra `transformers`), built from a config.json and loaded from a checkpoint.

Dropout is disabled, so that a training step is a deterministic function of weights and batch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatlab.errors import UserError, reason
from flatlab.models.foreign import impossible, misfit

OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # of checkpoints from TensorFlow
POOLER = re.compile(r"\w+\.pooler\.")  # part of the base model, which some checkpoints lack
LABELS = ("id2label", "label2id", "num_labels", "problem_type")  # entries that describe the checkpoint's own task
DROPOUT = re.compile(r"dropout(_prob)?$|_pdrop$")
BUFFERS = ("position_ids", "token_type_ids")  # constant buffers that older checkpoints contain


class Sentences(nn.Module):
    """The features of a sequence classifier: from token ids (N, T) to the inputs of its last linear layer (N, width).

    Args:
        model: a sequence classifier whose last linear layer is replaced by the identity.
        last: the name of that layer in the model.
        biased: whether that layer has a bias; the head that replaces it always has one.
    """

    def __init__(self, model: Any, last: str, *, biased: bool) -> None:
        super().__init__()
        self.model, self.last, self.biased = model, last, biased
        self.padding = int(model.config.pad_token_id)

    def forward(self, pieces: Tensor) -> Tensor:
        """Return the features (N, width); padding is masked in attention."""
        seen = pieces.ne(self.padding).long()
        features: Tensor = self.model(input_ids=pieces, attention_mask=seen).logits
        return features


def classifier(config: str, length: int) -> tuple[Sentences, int]:
    """Return a randomly initialised sequence classifier, and the width of its features.

    Args:
        config: the text of config.json.
        length: tokens of a sentence, padding included.

    Raises:
        UserError: transformers has no such classifier, the configuration has no pad_token_id, or `length` exceeds the
            number of its positions.
    """
    from transformers import AutoModelForSequenceClassification

    settings = settings_of(config)
    if settings.pad_token_id is None:
        raise UserError("The model's config.json must have the entry pad_token_id, which is missing.")
    longest = getattr(settings, "max_position_embeddings", length)
    if length > longest:
        raise UserError(
            f"The model has positions for {longest} word pieces, got {length}: write --image-size {longest}."
        )
    try:
        model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"transformers has no sequence classifier of model_type {settings.model_type!r}.") from error
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    outside = (name for name, _ in model.named_modules() if not name.startswith(f"{model.base_model_prefix}."))
    last = [name for name in outside if isinstance(model.get_submodule(name), nn.Linear)][-1]
    linear = model.get_submodule(last)
    model.set_submodule(last, nn.Identity())
    return Sentences(model, last, biased=linear.bias is not None), linear.in_features


def settings_of(config: str) -> Any:
    """Return the configuration in the text of a config.json, with every dropout rate set to 0.

    Raises:
        UserError: transformers does not accept it.
    """
    from transformers import AutoConfig

    given = {key: value for key, value in json.loads(config).items() if key not in LABELS}
    try:
        settings = AutoConfig.for_model(given.pop("model_type"), **given)
    except Exception as error:  # of several types, among them those of its own validation
        raise UserError(f"transformers refuses the model's config.json: {reason(error)}") from error
    for key, value in vars(settings).items():
        if DROPOUT.search(key) and value is not None:
            setattr(settings, key, 0.0)
    return settings


def load(features: Sentences, head: nn.Linear, state: Mapping[str, Tensor], *, name: str, source: str) -> list[str]:
    """Load a checkpoint of the whole classifier or of its encoder; return the names of tensors that were not loaded.

    The file's head is loaded if it has the same number of classes. The head and the layers between encoder and head
    keep their values where the file does not contain them; heads of other tasks in the file are ignored.

    Args:
        features: the classifier's features; receives the weights.
        head: its last linear layer; receives the weights.
        state: the file's tensors, by the names of transformers.
        name: the network's name, for errors.
        source: the file's name, for errors.

    Raises:
        UserError: a tensor of the encoder is missing, unexpected, or of another shape, or its values are impossible;
            the first one is named.
    """
    model: Any = features.model
    expected = model.state_dict() | {f"{features.last}.{key}": each for key, each in head.state_dict().items()}
    base = f"{model.base_model_prefix}."
    given = {_name(key, expected, base): each for key, each in state.items() if not key.endswith(BUFFERS)}
    stored = {expected[key].data_ptr(): given[key] for key in given if key in expected}
    tied = {key: stored[each.data_ptr()] for key, each in expected.items() if each.data_ptr() in stored}
    given = {**tied, **given}
    if not features.biased and f"{features.last}.weight" in given:
        given[f"{features.last}.bias"] = torch.zeros_like(head.bias)
    parts = {key.split(".")[1] for key in expected if key.startswith(base)}
    inner = {key for key in given if key.removeprefix(base).split(".")[0] in parts}
    last = {key for key in expected if key.startswith(f"{features.last}.")}
    fits = all(key in given and given[key].shape == expected[key].shape for key in last)
    drawn = {key for key in expected if key not in given and (POOLER.match(key) or not key.startswith(base))}
    drawn |= set() if fits else last
    wanted = {key: each for key, each in expected.items() if key not in drawn}
    names = {key: key for key in given if (key in inner or key in wanted)}
    if fault := misfit(names, given, wanted):
        raise UserError(f"{source} does not fit {name}, which has {len(wanted)} tensors: {fault}.")
    for key in names:
        if fault := impossible(given[key], key):
            raise UserError(f"{source}: {key} {fault}.")
    model.load_state_dict({key: given[key] for key in wanted if key not in last}, strict=False)
    if fits:
        head.load_state_dict({key.rpartition(".")[2]: given[key] for key in last})
    return sorted(drawn)


def order_classes(head: nn.Linear, config: str, classes: Sequence[str]) -> None:
    """Permute a head's rows, in place, from the configuration's order of classes to that of the data.

    Names are compared without regard to case. Where they are not the same set, as with LABEL_0, the order is kept.
    """
    named = json.loads(config).get("id2label") or {}
    theirs = [str(named[key]).lower() for key in sorted(named, key=int)]
    ours = [name.lower() for name in classes]
    if sorted(theirs) == sorted(set(ours)):
        rows = [theirs.index(name) for name in ours]
        head.load_state_dict({key: each[rows] for key, each in head.state_dict().items()})


def _name(key: str, expected: Mapping[str, Tensor], base: str) -> str:
    """Return our name of a file's tensor; names in a checkpoint of the encoder alone lack the classifier's prefix."""
    for old, new in OLD.items():
        key = key.replace(old, new)
    return key if key in expected or f"{base}{key}" not in expected else f"{base}{key}"
