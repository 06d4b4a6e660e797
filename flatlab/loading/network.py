"""A run's network: built, quantizer attached, parameters by their roles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flatlab.data.domains import DomainSet
from flatlab.data.text.tokenizers import saved_tokenizer
from flatlab.errors import UserError
from flatlab.files import file_hash
from flatlab.loading.data import device
from flatlab.models import classifiers, clip, saved
from flatlab.models.foreign import read_foreign
from flatlab.models.networks import Ensemble, Network, build_network, side_of
from flatlab.quant import attach
from flatlab.quant.fixed import Fixed
from flatlab.quant.inq import INQ
from flatlab.specs.quantizers import BothSpec, INQSpec, QuantSpec
from flatlab.specs.run import Place, RunSpec


def network(spec: RunSpec, data: DomainSet, place: Place) -> Network:
    """Return the initialised full-precision network of a run, on the device."""
    built = build_network(
        spec.model,
        num_classes=len(data.classes),
        in_channels=data.domains[0].images.shape[1],
        weights=_weights(spec, place),
        seed=spec.seed,
        config=config_of(spec.model, place),
    )
    side = side_of(built)
    if side not in (None, spec.image_size):
        raise UserError(
            f"{spec.model} takes images of {side} pixels, got {spec.image_size}: write --image-size {side}."
        )
    if isinstance(built.features, clip.ImageTower) and spec.weights != "none":
        align(built, spec, read_foreign(Path(_weights(spec, place))), data, place)
    if isinstance(built.features, classifiers.Sentences) and spec.weights != "none":
        classifiers.order_classes(built.head, str(config_of(spec.model, place)), data.classes)
    return built.to(device(place))


def align(built: Network, spec: RunSpec, state: Mapping[str, torch.Tensor], data: DomainSet, place: Place) -> None:
    """Set the weights of CLIP's head to the vectors of the classes, from the text tower of a checkpoint."""
    config = config_of(spec.model, place)
    assert config and place.model_dir
    tokenizer = saved_tokenizer(Path(place.model_dir))
    vectors = clip.class_vectors(tokenizer, config, state, data.classes)
    built.head.load_state_dict({"weight": vectors})


def config_of(model: str, place: Place) -> str | None:
    """Return the text of config.json for a network that transformers saved; None for others."""
    return json.dumps(saved.config_of(saved.checked(model, place.model_dir))) if saved.is_saved(model) else None


def finished(spec: RunSpec, data: DomainSet, place: Place) -> Network | Ensemble:
    """Return the final network of a run, to load a checkpoint into: with its quantizer, or an ensemble's members."""
    if spec.members:
        return Ensemble([finished(member, data, place) for member in spec.members], combine=spec.combine)
    built = network(spec.replace(weights="none"), data, place)  # the checkpoint contains all weights
    quantize(built, spec)
    return built


def _weights(spec: RunSpec, place: Place) -> str | Path:
    if not spec.weights.startswith("sha256:"):
        return spec.weights
    if place.weights_file is None:
        raise UserError(f"This run starts from a weights file ({spec.weights[:19]}...); name it with --weights FILE.")
    if f"sha256:{file_hash(Path(place.weights_file))}" != spec.weights:
        raise UserError(f"{place.weights_file} is not the weights file that this run names ({spec.weights[:19]}...).")
    return Path(place.weights_file)


def quantize(built: Network, spec: RunSpec) -> list[nn.Parameter]:
    """Attach the spec's quantizer to a network; return its learned step sizes, if any.

    The modules of post-training quantization are attached empty; their content is loaded or computed later.
    """
    match spec.quantizer:
        case None:
            return []
        case QuantSpec() as q:
            options = q.model_dump(include={"bits", "granularity", "grad_scale", "signed", "log_scale"})
            where: dict[str, Any] = {"outside": "" if q.head else "head", "embeddings": q.embeddings}
            first = next(iter(attach.layers(built, **where)))
            attach.attach(built, skip=[first] if isinstance(q, BothSpec) or q.skip_first else [], **where, **options)
            own: dict[str, Any] = (
                {"start": q.activation_start, "count": q.activation_count} if isinstance(q, BothSpec) else {}
            )
            if q.activations != "none":
                own |= {"bits": q.activation_bits, "signed": q.activations == "signed"}
                attach.attach_activations(built, signed_first=isinstance(q, BothSpec), **own)
        case INQSpec() as q:
            grid = q.model_dump(include={"bits", "granularity", "grid"})
            attach.attach_each(built, lambda _, weight, axis: INQ(weight, axis=axis, **grid))
        case q:
            kind = q.model_dump(include={"bits", "granularity"})
            attach.attach_each(built, lambda _, weight, axis: Fixed.empty(weight, axis=axis, **kind))
    return list(attach.scales(built).values())


def roles(built: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Sort the parameters by role: weights (of convolutions and the like), norms, scales (step sizes), head."""
    step_sizes = {id(scale) for scale in attach.scales(built).values()}
    sorted_: dict[str, dict[str, nn.Parameter]] = {"weights": {}, "norms": {}, "scales": {}, "head": {}}
    for name, parameter in built.named_parameters():
        if id(parameter) in step_sizes:
            sorted_["scales"][name] = parameter
        elif name.startswith("head."):
            sorted_["head"][name] = parameter
        else:
            sorted_["weights" if parameter.ndim > 1 else "norms"][name] = parameter
    return sorted_


def load(built: nn.Module, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Load a checkpoint's arrays into a network built from the same spec.

    Args:
        built: the network, with the quantizer of the run, if it has one.
        weights: arrays by parameter name.

    Raises:
        UserError: if names or shapes do not fit.
    """
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    try:
        built.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"The checkpoint is of another architecture than its spec: {reason}") from None
