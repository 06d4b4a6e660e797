"""Spatial layout of the outputs of a layer: (N, C, H, W), (N, H, W, C), or tokens (N, T, D); a model's logits."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatlab.errors import UserError

PREFIXES = range(6)  # number of tokens before the patches: class token, DeiT's two, registers
INSIDE = ("attention", "attn")  # in the name of a type
PROJECTIONS = ("qkv", "to_qkv", "q_norm", "k_norm", "query", "key", "q_proj", "k_proj")  # children of an attention
Sides = tuple[int, int]


def as_grid(outputs: Tensor, image: Sides, *, grid: Sides | None = None, trailing: bool = False) -> Tensor | None:
    """Return outputs as a view (N, C, h, w); None if they are not a grid, or their layout is ambiguous.

    The grid has the aspect ratio of the image: for a square one, channels are the last axis of (N, 7, 7, 768).

    Args:
        outputs: of a layer.
        image: height and width of the inputs.
        grid: height and width of the grid, if known.
        trailing: whether the network has layers that work on the last axis of four. Only then can channels be last.
    """
    if outputs.ndim == 3:
        sides = grid or _patches(outputs.shape[1], image)
        if sides is None or sides[0] * sides[1] > outputs.shape[1]:
            return None
        patches = outputs[:, outputs.shape[1] - sides[0] * sides[1] :]
        return patches.reshape(len(patches), *sides, -1).permute(0, 3, 1, 2)
    if outputs.ndim != 4:
        return None
    first, last = tuple(outputs.shape[2:]), tuple(outputs.shape[1:3])
    if grid is not None:
        return outputs if first == grid else outputs.permute(0, 3, 1, 2) if last == grid else None
    off, other = _off(first, image), _off(last, image)
    if math.isclose(off, other, abs_tol=1e-9):
        return None if trailing else outputs
    if off < other:
        return outputs
    return outputs.permute(0, 3, 1, 2) if trailing else None


def scores_of(outputs: Any, images: int, *, one: float = 1.0) -> Tensor:
    """Return logits (N, num_classes) from the outputs of a model; for one logit z those of two classes, -z and z.

    Args:
        outputs: of the model.
        images: number of images N.
        one: factor of a single logit: with 1/2, the softmax over the two is its sigmoid.
    """
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("logits")
    elif isinstance(outputs, tuple | list):
        logits = next((each for each in outputs if isinstance(each, Tensor)), None)
    elif not isinstance(outputs, Tensor):
        logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor) and logits.shape == (images,):
        logits = logits.unsqueeze(1)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != images:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(outputs).__name__} without"
        raise UserError(
            f"GradCAM needs a model that returns logits (N, num_classes), got {got}: wrap it in a module that does."
        )
    return torch.cat([-one * logits, one * logits], dim=1) if logits.shape[1] == 1 else logits


def inside_attention(model: nn.Module) -> set[str]:
    """Return the names of the modules inside an attention, whose outputs are parts of tokens, not grid cells."""
    names = set[str]()
    for name, module in model.named_modules():
        if _is_attention(module):
            names |= {f"{name}.{each}".lstrip(".") for each, _ in module.named_modules() if each}
    return names


def _is_attention(module: nn.Module) -> bool:
    named = any(word in type(module).__name__.lower() for word in INSIDE)
    return named or any(name in PROJECTIONS for name, _ in module.named_children())


def _patches(tokens: int, image: Sides) -> Sides | None:
    """Return the sides of the grid of tokens, in the image's aspect ratio, after a prefix of tokens without patch."""
    for prefix in PREFIXES:
        count = max(0, tokens - prefix)
        height = round(math.sqrt(count * image[0] / image[1]))
        width = count // height if height else 0
        if count > 1 and height * width == count and abs(width - height * image[1] / image[0]) < 1:
            return height, width
    return None


def _off(sides: tuple[int, ...], image: Sides) -> float:
    """Return the difference of the logarithms of the aspect ratios of a grid and of the image."""
    return abs(math.log(sides[0] / sides[1]) - math.log(image[0] / image[1]))
