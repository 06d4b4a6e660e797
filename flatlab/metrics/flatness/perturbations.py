"""Random directions, shared by all models of one architecture, raw or scaled to the weights."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flatlab.arguments import Normalisation
from flatlab.errors import UserError, choose
from flatlab.landscape.landscape import Landscape
from flatlab.seeds import generator
from flatlab.tensors.flat import PIECE, length, row_lengths

Noise = Literal["sphere", "normal", "uniform"]


def draw_direction(
    landscape: Landscape,
    seed: int,
    k: int,
    *,
    normalisation: Normalisation = "none",
    noise: Noise = "sphere",
    like: Tensor | None = None,
) -> Tensor:
    """Return direction k (P,): of length 1, or as long as w (or a vector `like`) in each filter, layer or parameter.

    Drawn in float32, whatever the model's dtype, on its device: models of one architecture share directions on one kind
    of device. On a GPU a draw on the host would take longer than a forward pass. Noise other than "sphere" keeps its
    own length: entries normal, or uniform on [-1, 1]. On the sphere, without a normalisation, a direction has the norm
    of `like`, if given.
    """
    device = landscape.device
    rng = generator("sphere", seed, k, device=device)
    drawn = torch.randn(landscape.num_params, generator=rng, device=device, dtype=torch.float32)
    if noise == "uniform":
        drawn = 2 * torch.rand(landscape.num_params, generator=rng, device=device, dtype=torch.float32) - 1
    if normalisation != "none":
        return _scaled(landscape.as_point(drawn), landscape, normalisation, like)
    if noise == "sphere":
        drawn.div_(length(drawn))
        if like is not None:
            drawn.mul_(float(length(like)))
    return landscape.as_point(drawn)


def scale_to_weights(
    vector: Tensor, landscape: Landscape, normalisation: Normalisation = "filter", like: Tensor | None = None
) -> Tensor:
    """Scale a direction (P,) to the weights (arXiv 1712.09913, section 4): by filter, by layer, or by entry.

    A filter is a slice along the first axis of a tensor of more than one axis, a layer is such a tensor; BatchNorm
    and biases are fixed. "parameter" multiplies each entry of all tensors by |w| (Kwon et al. 2021).
    A vector `like` (P,), such as a perturbation, replaces the weights. Zero entries stay zero.
    """
    return _scaled(landscape.as_point(vector).clone(), landscape, normalisation, like)


def _scaled(vector: Tensor, landscape: Landscape, normalisation: Normalisation, like: Tensor | None) -> Tensor:
    """Scale a direction in place, and return it."""
    lengths = landscape.parts if like is None else landscape.split(like)
    for z, w in zip(landscape.split(vector), lengths, strict=True):
        if normalisation == "parameter":
            z.mul_(w.abs())
        elif w.ndim < 2:
            z.zero_()
        elif normalisation == "filter":
            _multiply(z, _ratios(_lengths(w), _lengths(z)))
        else:
            z.mul_(_ratios(w.norm(), z.norm()))
    return vector


def reach(landscape: Landscape, normalisation: Normalisation) -> float:
    """Return the Euclidean norm of a direction: 1, or (on average) that of the weights to which it is scaled."""
    if normalisation == "none":
        return 1.0
    if normalisation == "parameter":
        return landscape.norm
    moved = [w for w in landscape.parts if w.ndim > 1]
    return float(torch.stack([_lengths(w).square().sum() for w in moved]).sum().sqrt())


def check_normalisation(normalisation: str, landscape: Landscape) -> Normalisation:
    """Return a known normalisation that applies to the landscape's tensors.

    Args:
        normalisation: its name.
        landscape: the landscape whose weights set the scale.

    Raises:
        UserError: if no tensor would be perturbed.
    """
    known: tuple[Normalisation, ...] = get_args(Normalisation)
    name = known[known.index(choose("normalisation", normalisation, known))]
    if name in ("filter", "layer") and all(w.ndim < 2 for w in landscape.parts):
        raise UserError(
            f'normalisation="{name}" moves tensors of more than one axis, but the landscape has none: write "none".'
        )
    return name


def _multiply(tensor: Tensor, factors: Tensor) -> None:
    """Multiply each filter in place, a few at a time: float64 factors would make float64 copies of all."""
    few = max(1, PIECE // max(1, tensor[:1].numel()))
    for filters, own in zip(torch.split(tensor, few), torch.split(factors, few), strict=True):
        filters.mul_(own)


def _lengths(tensor: Tensor) -> Tensor:
    """Return the length of each filter, in float64, shaped to scale the tensor."""
    return torch.reshape(row_lengths(tensor.flatten(1)), (-1, *[1] * (tensor.ndim - 1)))


def _ratios(wanted: Tensor, lengths: Tensor) -> Tensor:
    """Return the factors from lengths to wanted lengths; 0 for a length of 0."""
    return torch.where(lengths > 0, wanted / lengths, 0.0)
