"""GradCAM (Selvaraju et al. 2017): where in an image a network finds evidence for a class, and numbers beside it.

The maps are those of the `grad-cam` library, taken before it scales each by itself: two networks can then be shown on
one scale.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.maps import agreement, ratio
from flatlab.metrics.results import FloatArray
from flatlab.probes import refuse_training

PREFIXES = range(6)  # tokens before the patches: none, a class token, DeiT's two, registers


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """Where images hold evidence for a class.

    Attributes:
        maps: (N, H, W) at the images' size, not negative, in the units of the logit; zero where nothing speaks for it.
        classes: (N,) the class that each map explains.
        layer: name of the module whose outputs were weighed.
        grid: its height and width.
    """

    maps: FloatArray
    classes: tuple[int, ...]
    layer: str
    grid: tuple[int, int]

    def scaled(self) -> FloatArray:
        """Return the maps, each divided by its own largest value, as papers show them; zero maps stay zero."""
        peaks = self.maps.max(axis=(1, 2), keepdims=True)
        return ratio(self.maps, peaks, 0.0)


def gradcam(
    model: nn.Module,
    inputs: Tensor,
    classes: Sequence[int],
    *,
    layer: str | None = None,
    grid: tuple[int, int] | None = None,
) -> ClassMaps:
    """Return the evidence for one class in each image: ReLU of the channels' sum, weighed by their mean gradients.

    Args:
        model: in eval mode, with logits (N, num_classes); a quantized one is baked first. It is left bit-identical.
        inputs: (N, C, H, W).
        classes: (N,) which class is explained; the true one where two networks are compared.
        layer: name of a module; None finds the last one that has a grid with a gradient (`explained_layer`).
        grid: height and width, where a layer gives tokens (N, T, D) of which a square one cannot be inferred.

    Raises:
        UserError: where the model trains, or no layer does.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    refuse_training(model)
    name = explained_layer(model, inputs[:1], classes[0]) if layer is None else layer
    modules = dict(model.named_modules())
    if name not in modules:
        raise UserError(f"The model has no layer {name!r}; its layers are those of model.named_modules().")
    seen: list[tuple[int, int]] = []

    def spread(outputs: Tensor) -> Tensor:
        cells = _as_grid(outputs, name, grid)
        seen.append((cells.shape[2], cells.shape[3]))
        return cells

    layers, targets = [modules[name]], [ClassifierOutputTarget(each) for each in classes]
    with _left_alone(model), torch.enable_grad(), ExitStack() as stack:
        cam = GradCAM(model, layers, reshape_transform=spread)
        held = cam.activations_and_grads
        stack.callback(held.release)  # not `with cam`, which swallows an IndexError
        cam(inputs.detach().clone().requires_grad_(), targets)
        weighed = cam.get_cam_image(inputs, layers[0], targets, held.activations[0].numpy(), held.gradients[0].numpy())
    rough = torch.from_numpy(np.maximum(weighed, 0)).double().unsqueeze(1)
    maps = F.interpolate(rough, size=inputs.shape[-2:], mode="bilinear", align_corners=False)
    return ClassMaps(maps.squeeze(1).numpy(), tuple(map(int, classes)), name, seen[0])


def explained_layer(model: nn.Module, inputs: Tensor, label: int) -> str:
    """Return the name of the last module to run whose outputs form a grid of which several cells have a gradient.

    Of ResNets this is the last stage, of MobileNetV2 the last convolution with its norm, of a ViT that reads its class
    token the norm before the last attention: behind that, patches no longer reach the logits.

    Args:
        model: in eval mode.
        inputs: (1, C, H, W).
        label: the class whose logit is differentiated.
    """
    ran: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, outputs: Any) -> None:
            del module, arguments
            if isinstance(outputs, Tensor) and outputs.requires_grad and _cells(outputs):
                ran.append((name, outputs))

        return hook

    with _left_alone(model), torch.enable_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if name and "Pool" not in type(module).__name__:
                stack.callback(module.register_forward_hook(note(name)).remove)
        logits = model(inputs.detach().clone().requires_grad_())
        outputs = [each for _, each in ran]
        gradients = torch.autograd.grad(logits[0, label], outputs, allow_unused=True) if outputs else ()
    for (name, _), gradient in reversed(list(zip(ran, gradients, strict=True))):
        if gradient is not None and int((_flat(gradient).abs().sum(1) > 0).sum()) > 1:
            return name
    raise UserError(
        "No layer of the model gives a grid (N, C, H, W), or tokens (N, T, D), of several cells that the logits depend "
        "on: name one with layer=..., or take larger images."
    )


def _cells(outputs: Tensor) -> bool:
    """Whether outputs are a grid of several cells, or tokens of a square one."""
    if outputs.ndim == 4:
        return outputs.shape[2] * outputs.shape[3] > 1
    return outputs.ndim == 3 and _square(outputs.shape[1]) is not None


def _square(tokens: int) -> tuple[int, int] | None:
    """Return how many tokens come before the patches, and the side of the square that these form."""
    for prefix in PREFIXES:
        side = math.isqrt(max(0, tokens - prefix))
        if side > 1 and side * side == tokens - prefix:
            return prefix, side
    return None


def _flat(gradient: Tensor) -> Tensor:
    """Return a gradient's patch cells (cells, channels) of the first image."""
    if gradient.ndim == 4:
        return gradient[0].flatten(1).T
    square = _square(gradient.shape[1])
    return gradient[0, square[0] if square else 0 :]


def _as_grid(outputs: Tensor, name: str, grid: tuple[int, int] | None) -> Tensor:
    """Return outputs as (N, C, H, W)."""
    if outputs.ndim == 4:
        return outputs
    square = _square(outputs.shape[1]) if outputs.ndim == 3 else None
    sides = grid or (square and (square[1], square[1]))
    if outputs.ndim != 3 or sides is None or sides[0] * sides[1] > outputs.shape[1]:
        raise UserError(
            f"The outputs of {name!r} have shape {tuple(outputs.shape)}, which is neither (N, C, H, W) nor tokens "
            "(N, T, D) of a square grid: name another layer, or give grid=(height, width)."
        )
    patches = outputs[:, outputs.shape[1] - sides[0] * sides[1] :]
    return patches.reshape(len(patches), *sides, -1).permute(0, 3, 1, 2)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Keep parameters out of the graph, and put their flags and gradients back: the library clears them."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


def moved_agreement(
    landscape: Landscape, inputs: Tensor, maps: ClassMaps, *, ray: Tensor, radii: Sequence[float]
) -> FloatArray:
    """Return how far the maps stay the same when the weights move along a ray: correlations (R, N).

    Args:
        landscape: around the network.
        inputs: (N, C, H, W).
        maps: of these images, at the point itself.
        ray: direction (P,), of length 1 for absolute radii.
        radii: (R,) distances.
    """
    there = []
    for radius in radii:
        with _moved(landscape, landscape.point + radius * ray):
            there.append(gradcam(landscape.model, inputs, maps.classes, layer=maps.layer, grid=maps.grid))
    return np.stack([agreement(maps.maps, each.maps) for each in there])


@contextmanager
def _moved(landscape: Landscape, vector: Tensor) -> Iterator[None]:
    """Put the model at a point (P,), and back bit by bit afterwards."""
    tensors: list[Tensor] = list(landscape.named.values())
    try:
        with torch.no_grad():
            torch._foreach_copy_(tensors, landscape.split(vector))
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, landscape.split(landscape.point))


@torch.no_grad()
def ablation(
    model: nn.Module, inputs: Tensor, maps: ClassMaps, *, num_shares: int = 10, fill: float = 0.0
) -> tuple[FloatArray, FloatArray]:
    """Return deletion and insertion curves (Petsiuk et al. 2018, with one colour instead of a blur).

    Pixels go (or come) in the order of the map, of equals those further up and left first. A map that points at what
    the network uses lets the class's probability fall fast in deletion, and rise fast in insertion.

    Args:
        model: in eval mode.
        inputs: (N, C, H, W).
        maps: of these images.
        num_shares: the curves have a point at each multiple of 1 / num_shares of the pixels.
        fill: what stands for "nothing"; 0 is the mean colour of normalised images.

    Returns:
        (N, num_shares + 1) each: the class's probability after a share of the pixels has been taken away, or is there.
    """
    ranks = np.argsort(np.argsort(-maps.maps.reshape(len(maps.maps), -1), axis=1, kind="stable"), axis=1)
    order = torch.from_numpy(ranks).reshape(maps.maps.shape).unsqueeze(1).to(inputs.device)
    pixels = ranks.shape[1]
    rows = torch.arange(len(inputs), device=inputs.device)
    classes = torch.tensor(maps.classes, device=inputs.device)
    deleted: list[FloatArray] = []
    inserted: list[FloatArray] = []
    for count in np.rint(np.linspace(0, pixels, num_shares + 1)):
        first = order < count
        for curve, kept in ((deleted, ~first), (inserted, first)):
            probabilities = model(torch.where(kept, inputs, fill)).double().softmax(1)
            curve.append(probabilities[rows, classes].cpu().numpy())
    return np.stack(deleted, axis=1), np.stack(inserted, axis=1)
