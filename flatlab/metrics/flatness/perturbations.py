"""Random directions, shared by all models of one architecture, raw or scaled to the weights."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flatlab.errors import UserError, choose
from flatlab.landscape.landscape import Landscape
from flatlab.results.sphere import Normalisation
from flatlab.seeds import generator

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
    drawn = torch.randn(landscape.num_params, generator=rng, device=device)
    if noise == "uniform":
        drawn = 2 * torch.rand(landscape.num_params, generator=rng, device=device) - 1
    if normalisation != "none":
        return scale_to_weights(drawn, landscape, normalisation, like)
    if noise == "sphere":
        drawn.div_(torch.linalg.vector_norm(drawn, dtype=torch.float64))
        if like is not None:
            drawn.mul_(float(torch.linalg.vector_norm(like, dtype=torch.float64)))
    return landscape.as_point(drawn)


def scale_to_weights(
    vector: Tensor, landscape: Landscape, normalisation: Normalisation = "filter", like: Tensor | None = None
) -> Tensor:
    """Scale a direction (P,) to the weights (arXiv 1712.09913, section 4): by filter, by layer, or by entry.

    A filter is a slice along the first axis of a tensor of more than one axis, a layer is such a tensor; BatchNorm
    and biases are fixed. "parameter" multiplies each entry of all tensors by |w| (Kwon et al. 2021).
    A vector `like` (P,), such as a perturbation, replaces the weights. Zero entries stay zero.
    """
    scaled = landscape.as_point(vector).clone()
    lengths = landscape.point if like is None else like
    for z, w in zip(landscape.split(scaled), landscape.split(lengths), strict=True):
        if normalisation == "parameter":
            z.mul_(w.abs())
        elif w.ndim < 2:
            z.zero_()
        elif normalisation == "filter":
            z.mul_(_ratios(_lengths(w), _lengths(z)))
        else:
            z.mul_(_ratios(w.norm(), z.norm()))
    return scaled


def reach(landscape: Landscape, normalisation: Normalisation) -> float:
    """Return the Euclidean norm of a direction: 1, or (on average) that of the weights to which it is scaled."""
    if normalisation == "none":
        return 1.0
    if normalisation == "parameter":
        return landscape.norm
    moved = [w for w in landscape.split(landscape.point) if w.ndim > 1]
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
    if name in ("filter", "layer") and all(w.ndim < 2 for w in landscape.split(landscape.point)):
        raise UserError(
            f'normalisation="{name}" moves tensors of more than one axis, but the landscape has none: write "none".'
        )
    return name


def _length(vector: Tensor) -> Tensor:
    """Return the length of a long vector to 1e-6: float32 is less accurate, float64 takes 20 times as long."""
    pieces = torch.split(vector, 2**15)  # short enough for one thread
    lengths = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])
    return lengths.double().square().sum().sqrt()


def _lengths(tensor: Tensor) -> Tensor:
    """Return the length of each filter, in float64, shaped to scale the tensor."""
    flat = torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64)
    return torch.reshape(flat, (-1, *[1] * (tensor.ndim - 1)))


def _ratios(wanted: Tensor, lengths: Tensor) -> Tensor:
    """Return the factors from lengths to wanted lengths; 0 for a length of 0."""
    return torch.where(lengths > 0, wanted / lengths, 0.0)
