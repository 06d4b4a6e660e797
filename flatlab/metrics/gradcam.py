"""GradCAM (Selvaraju et al. 2017): maps of the evidence for a class in an image, and measures of their faithfulness.

The maps are those of the `grad-cam` library before it scales each by its own range, so that two networks can be shown
on one scale. A layer's outputs are copied before later layers change them in place; of a layer that runs twice, one run
is chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from flatlab.arguments import FloatArray, whole
from flatlab.errors import UserError, choose, count_of
from flatlab.landscape.checks import refuse_training
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.cells import as_grid, inside_attention, scores_of
from flatlab.results.gradcam import ClassMaps, Method, agreement

LIBRARY = {"gradcam++": "GradCAMPlusPlus", "xgradcam": "XGradCAM", "hirescam": "HiResCAM", "layercam": "LayerCAM"}


def gradcam(
    model: nn.Module,
    inputs: Tensor,
    classes: Sequence[int],
    *,
    layer: str | None = None,
    grid: tuple[int, int] | None = None,
    method: Method = "gradcam",
) -> ClassMaps:
    """Return the evidence for one class in each image: ReLU of the sum of channels weighted by their mean gradients.

    Args:
        model: in eval mode, with logits (N, num_classes); a quantized one is baked first. It is left bit-identical.
            Outputs may be a tuple, whose first tensor is used, or a mapping or dataclass with an entry `logits`. One
            logit (N, 1) is evidence for class 1, and with the other sign for class 0.
        inputs: (N, C, H, W).
        classes: (N,) the class explained in each image; the true one if two networks are compared.
        layer: name of a module; None: the last one that has a grid with a gradient (`explained_layer`). If it runs
            several times, the last run that has a gradient in several cells is used.
        grid: height and width of the grid, if a layer returns tokens (N, T, D) from which it cannot be inferred.
        method: how channels are weighed: "gradcam" by flatlab, the others by the grad-cam library, of the same outputs
            and gradients. Only maps of one method can be compared.

    Raises:
        UserError: if the model is in training mode, or layer, classes, method or the model's outputs are invalid.
    """
    refuse_training(model)
    choose("method", method, get_args(Method))
    labels = _labels(inputs, classes)
    name = explained_layer(model, inputs[:1], labels[0]) if layer is None else layer
    if name not in dict(model.named_modules()):
        raise UserError(f"The model has no layer {name!r}; its layers are those of model.named_modules().")
    with _left_alone(model), torch.enable_grad():
        seen = _trace(model, inputs, lambda each, _: each == name)
        spread = [as_grid(each, _sides(inputs), grid=grid, trailing=seen.trailing) for _, each in seen.ran]
        if not spread or any(each is None for each in spread):
            raise UserError(_no_grid(name, seen.ran, grid))
        gradients = torch.autograd.grad(_picked(seen.scores, labels), [each for _, each in seen.ran], allow_unused=True)
    grids = [as_grid(each, _sides(inputs), grid=grid, trailing=seen.trailing) for each in gradients if each is not None]
    used = [cells for cells, gradient in zip(spread, gradients, strict=True) if gradient is not None]
    if not used:
        raise UserError(f"The logits do not depend on the outputs of layer {name!r}: name another layer.")
    several = [index for index, each in enumerate(grids) if each is not None and _several(each)]
    chosen = several[-1] if several else -1
    activations, slopes = _array(used[chosen]), _array(grids[chosen])
    weighed = _weighed(model, activations, slopes, method)
    rough = torch.from_numpy(np.maximum(weighed, 0)).double().unsqueeze(1)
    maps = F.interpolate(rough, size=_sides(inputs), mode="bilinear", align_corners=False)
    return ClassMaps(maps.squeeze(1).numpy(), tuple(labels), name, activations.shape[2:], method)


def _weighed(model: nn.Module, activations: FloatArray, slopes: FloatArray, method: Method) -> FloatArray:
    """Return the sum over channels (N, C, H, W) of a layer's outputs, weighed by their gradients."""
    if method == "gradcam":
        return np.asarray((slopes.mean(axis=(2, 3))[:, :, None, None] * activations).sum(axis=1))
    import pytorch_grad_cam  # here: it takes seconds to load

    with getattr(pytorch_grad_cam, LIBRARY[method])(model, []) as library:
        return np.asarray(library.get_cam_image(None, None, None, activations, slopes, False))


def explained_layer(model: nn.Module, inputs: Tensor, label: int) -> str:
    """Return the name of the last module to run whose outputs form a grid of which several cells have a gradient.

    In ResNets this is the last stage, in MobileNetV2 the last convolution with its norm, in a ViT that reads its class
    token the norm before the last attention: after it, patches no longer affect the logits. Modules inside an attention
    are excluded.

    Args:
        model: in eval mode.
        inputs: (1, C, H, W).
        label: the class whose logit is differentiated.

    Raises:
        UserError: if there is no such module, or the label is not a class of the model.
    """
    labels, inside = _labels(inputs, [label]), inside_attention(model)
    with _left_alone(model), torch.enable_grad():
        seen = _trace(model, inputs, lambda name, outputs: isinstance(outputs, Tensor) and name not in inside)
        image = _sides(inputs)
        ran = [each for each in seen.ran if as_grid(each[1], image, trailing=seen.trailing) is not None]
        score = _picked(seen.scores, labels)
        gradients = torch.autograd.grad(score, [each for _, each in ran], allow_unused=True) if ran else ()
    for (name, _), gradient in reversed(list(zip(ran, gradients, strict=True))):
        cells = None if gradient is None else as_grid(gradient, image, trailing=seen.trailing)
        if cells is not None and _several(cells[:1]):
            return name
    raise UserError(
        "No layer of the model gives a grid (N, C, H, W), or tokens (N, T, D), of several cells that the logits depend "
        "on: name one with layer=..., or use larger images."
    )


@dataclass
class _Trace:
    """A forward pass: the wanted outputs of modules, in the order in which they ran, and the logits."""

    ran: list[tuple[str, Tensor]]
    trailing: bool = False  # a layer works on the last axis of four
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))


def _trace(model: nn.Module, inputs: Tensor, wanted: Callable[[str, Any], bool]) -> _Trace:
    seen = _Trace([])

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, outputs: Any) -> Any:
            del arguments
            leaves, structure = tree_flatten(outputs)
            place = next((index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
            if place is None:
                return None
            found = leaves[place]
            seen.trailing |= found.ndim == 4 and isinstance(module, nn.Linear | nn.LayerNorm)
            if not found.requires_grad or not wanted(name, outputs):
                return None
            seen.ran.append((name, found))
            leaves[place] = found.clone()  # the next layer may work in place
            return tree_unflatten(leaves, structure)

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and "Pool" not in type(module).__name__:
                stack.callback(module.register_forward_hook(note(name)).remove)
        seen.scores = scores_of(model(inputs.detach().clone().requires_grad_()), len(inputs))
    return seen


def _labels(inputs: Tensor, classes: Sequence[int]) -> list[int]:
    """Return the classes, one for each image."""
    if inputs.ndim != 4 or not inputs.numel():
        raise UserError(f"inputs must be images (N, C, H, W), got shape {tuple(inputs.shape)}.")
    if len(classes) != len(inputs):
        raise UserError(
            f"classes must name one class for each image, got {len(classes)} for {count_of(len(inputs), 'image')}."
        )
    return [whole("a class", each, least=0) for each in classes]


def _picked(scores: Tensor, labels: list[int]) -> Tensor:
    """Return the sum over images of the logits of their classes."""
    if max(labels) >= scores.shape[1]:
        raise UserError(f"classes must be below {scores.shape[1]}, the number of logits, got {max(labels)}.")
    return scores[torch.arange(len(labels)), labels].sum()


def _sides(inputs: Tensor) -> tuple[int, int]:
    return inputs.shape[-2], inputs.shape[-1]


def _several(cells: Tensor) -> bool:
    """Whether several cells of an image have a gradient (N, C, H, W)."""
    return bool(((cells.abs().sum(1) > 0).flatten(1).sum(1) > 1).any())


def _array(cells: Tensor | None) -> npt.NDArray[Any]:
    assert cells is not None
    narrow = cells.dtype in (torch.bfloat16, torch.float16)
    return np.asarray((cells.float() if narrow else cells).detach().cpu().numpy())


def _no_grid(name: str, ran: list[tuple[str, Tensor]], grid: tuple[int, int] | None) -> str:
    if not ran:
        return f"Layer {name!r} does not run, or returns no tensor with a gradient: name another layer."
    given = "" if grid is None else f" with grid={grid}"
    return (
        f"The outputs of {name!r} have shape {tuple(ran[-1][1].shape)}, which is not clearly (N, C, H, W), (N, H, W, C)"
        f" or tokens (N, T, D) of a grid{given}: name another layer, or give grid=(height, width)."
    )


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Exclude parameters from the graph, and restore their flags."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def moved_agreement(
    landscape: Landscape, inputs: Tensor, maps: ClassMaps, *, direction: Tensor, radii: Sequence[float]
) -> FloatArray:
    """Return the agreement of the maps with those of weights moved along a direction: correlations (R, N).

    Args:
        landscape: around the network.
        inputs: (N, C, H, W).
        maps: of these images, at the point itself.
        direction: vector (P,), of length 1 for absolute radii.
        radii: (R,) distances.
    """
    there = []
    for radius in radii:
        with _moved(landscape, landscape.point + radius * direction):
            there.append(
                gradcam(landscape.model, inputs, maps.classes, layer=maps.layer, grid=maps.grid, method=maps.method)
            )
    return np.stack([agreement(maps.maps, each.maps) for each in there])


@contextmanager
def _moved(landscape: Landscape, vector: Tensor) -> Iterator[None]:
    """Set the model to a point (P,), and restore it bit by bit afterwards."""
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

    Pixels are removed (or inserted) in the order of the map; of equal ones, those further up and left first. For a map
    of the pixels that the network uses, the class's probability falls fast in deletion, and rises fast in insertion.

    Args:
        model: in eval mode.
        inputs: (N, C, H, W).
        maps: of these images.
        num_shares: the curves have a point at each multiple of 1 / num_shares of the pixels.
        fill: value of removed pixels; 0 is the mean colour of normalised images.

    Returns:
        (N, num_shares + 1) each: the class's probability with a share of the pixels removed, or inserted.
    """
    whole("num_shares", num_shares)
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
            probabilities = scores_of(model(torch.where(kept, inputs, fill)), len(inputs), one=0.5).double().softmax(1)
            curve.append(probabilities[rows, classes].cpu().numpy())
    return np.stack(deleted, axis=1), np.stack(inserted, axis=1)
