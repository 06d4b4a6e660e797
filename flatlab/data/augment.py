"""DomainBed's training transform, applied to a whole batch on the training device.

RandomResizedCrop, flip, ColorJitter and RandomGrayscale, with the distributions of torchvision. All random numbers are
drawn first, on the CPU, for each sample: a batch is the same on every device, up to rounding. Pillow truncates to bytes
after each colour operation, which makes its images darker by 1.4 of 255 levels (measured); here only the crop is
rounded, and only on a CPU.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = (0.7, 1.0)  # of the picture's area
RATIO = (3 / 4, 4 / 3)  # width over height of the crop
TRIES = 10  # to draw a crop that fits, as torchvision
JITTER = 0.3  # of brightness, contrast, saturation, and hue (as a fraction of the circle)
GREY = 0.1  # share of the pictures that are converted to grey
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision
UNIFORMS = 2 * TRIES + 12  # random numbers per sample


class Draws(NamedTuple):
    """The transform of each of n pictures.

    Attributes:
        boxes: (n, 4) top, left, height, width of the crop, in pixels.
        flips: (n,) whether left and right are exchanged.
        factors: (n, 4) of brightness, contrast and saturation; and the shift of the hue.
        orders: (n, 4) the order in which those four are applied.
        greys: (n,) whether the picture is converted to grey.
    """

    boxes: npt.NDArray[np.int64]
    flips: npt.NDArray[np.bool_]
    factors: npt.NDArray[np.float64]
    orders: npt.NDArray[np.int64]
    greys: npt.NDArray[np.bool_]


def draw(sizes: npt.NDArray[np.int64], generator: torch.Generator) -> Draws:
    """Draw the transforms of pictures of these sizes, (n, 2) heights and widths.

    Each picture takes the same number of draws, so that its transform does not depend on the sizes of the others.
    """
    uniforms = torch.rand(len(sizes), UNIFORMS, generator=generator, dtype=torch.float64).numpy()
    crop, flip, factor, order, grey = np.split(uniforms, np.cumsum([2 * TRIES + 2, 1, 4, 4]), axis=1)
    factors = (2 * factor - 1) * JITTER + [1.0, 1.0, 1.0, 0.0]
    return Draws(_boxes(sizes, crop), flip[:, 0] < 0.5, factors, np.argsort(order, axis=1), grey[:, 0] < GREY)


def join(draws: Sequence[Draws]) -> Draws:
    """Return several draws as one."""
    return Draws(*map(np.concatenate, zip(*draws, strict=True)))


def augment(pictures: Sequence[Tensor], draws: Draws, size: int) -> Tensor:
    """Return pictures of any sizes, (3, h, w) bytes on one device, as (n, 3, size, size) float32 from 0 to 255."""
    # Per picture 0.1 (64 pixels) to 0.6 ms (224) on a core, ten times less than the products; on a GPU one launch
    # for each picture would take longer than training on it.
    resize = _crop_each if pictures[0].device.type == "cpu" else crop_together
    images = resize(pictures, draws.boxes, size).div_(255)
    flips = _rows(draws.flips, images.device)
    images[flips] = images[flips].flip(-1)
    factors = _sent(draws.factors, images.device).to(images.dtype)
    for turn in range(4):
        for kind, operation in enumerate(OPERATIONS):
            chosen = _rows(draws.orders[:, turn] == kind, images.device)
            images[chosen] = operation(images[chosen], factors[chosen, kind].view(-1, 1, 1, 1))
    greys = _rows(draws.greys, images.device)
    images[greys] = _grey(images[greys]).expand(-1, 3, -1, -1)
    return images.mul_(255)


def _rows(chosen: npt.NDArray[np.bool_], device: torch.device) -> Tensor:
    """Return row numbers: unlike indexing by a mask, indexing by them needs no synchronisation with the device."""
    return _sent(np.flatnonzero(chosen), device)


def _sent(numbers: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return numbers on a device, without waiting for work that is queued there."""
    return torch.from_numpy(numbers).to(device, non_blocking=True)


# --- crops ---


def _boxes(sizes: npt.NDArray[np.int64], uniforms: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the first of ten boxes that fits; if none does, the largest central one within the ratios."""
    heights, widths = sizes[:, :1], sizes[:, 1:]
    area = heights * widths * (SCALE[0] + (SCALE[1] - SCALE[0]) * uniforms[:, :TRIES])
    low, high = map(math.log, RATIO)
    ratio = np.exp(low + (high - low) * uniforms[:, TRIES : 2 * TRIES])
    box_widths, box_heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (box_widths > 0) & (box_widths <= widths) & (box_heights > 0) & (box_heights <= heights)
    first = np.argmax(fits, axis=1, keepdims=True)
    height, width = (np.take_along_axis(each, first, axis=1) for each in (box_heights, box_widths))
    top = np.floor(uniforms[:, -2:-1] * (heights - height + 1))
    left = np.floor(uniforms[:, -1:] * (widths - width + 1))
    found = np.hstack([top, left, height, width])
    return np.where(fits.any(axis=1, keepdims=True), found, _central(heights, widths)).astype(np.int64)


def _central(heights: npt.NDArray[np.int64], widths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    height = np.minimum(heights, np.rint(widths / RATIO[0]))
    width = np.minimum(widths, np.rint(heights * RATIO[1]))
    return np.hstack([(heights - height) // 2, (widths - width) // 2, height, width]).astype(np.int64)


def _crop_each(pictures: Sequence[Tensor], boxes: npt.NDArray[np.int64], size: int) -> Tensor:
    """Crop and resize one by one with torch's own kernel for bytes, antialiased as Pillow's."""
    crops = (each[:, y : y + h, x : x + w] for each, (y, x, h, w) in zip(pictures, boxes.tolist(), strict=True))
    resized = [F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True) for crop in crops]
    return torch.cat(resized).float()


def crop_together(pictures: Sequence[Tensor], boxes: npt.NDArray[np.int64], size: int) -> Tensor:
    """Crop and resize all pictures as two batched matrix products: the filter is separable."""
    height, width = int(boxes[:, 2].max()), int(boxes[:, 3].max())
    padded = pictures[0].new_zeros(len(pictures), 3, height, width)
    for place, each, (y, x, h, w) in zip(padded, pictures, boxes.tolist(), strict=True):
        place[:, :h, :w] = each[:, y : y + h, x : x + w]
    down, across = (_filter(boxes[:, axis], size, padded.device) for axis in (2, 3))
    return down @ padded.float() @ across.transpose(-1, -2)


def _filter(lengths: npt.NDArray[np.int64], size: int, device: torch.device) -> Tensor:
    """Return (n, 1, size, longest) weights of Pillow's bilinear filter, a triangle as wide as the reduction."""
    sides = _sent(lengths, device).view(-1, 1, 1, 1)
    scale = sides.float() / size
    positions = torch.arange(int(lengths.max()), device=device).float() + 0.5
    centres = (torch.arange(size, device=device).float().view(-1, 1) + 0.5) * scale
    weights = (1 - (positions - centres).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * (positions < sides)
    return weights / weights.sum(dim=-1, keepdim=True)


# --- colours: (n, 3, h, w) from 0 to 1, and a factor for each picture ---


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Scale towards or away from black."""
    return (images * factors).clamp_(0, 1)


def contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Scale towards or away from each picture's mean grey."""
    mean = _grey(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factors).clamp_(0, 1)


def saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Scale towards or away from each pixel's grey."""
    return torch.lerp(_grey(images), images, factors).clamp_(0, 1)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue in HSV space, by fractions of the circle."""
    (red, green, blue), high = images.unbind(1), images.amax(1)
    chroma = high - images.amin(1)
    whole = chroma.clamp(min=1e-12)  # grey pixels have no hue, and do not change
    reddest = torch.where(high == red, (green - blue) / whole, (red - green) / whole + 4)
    sixths = torch.where((high == green) & (high != red), (blue - red) / whole + 2, reddest)
    offsets = images.new_tensor([5, 3, 1]).view(1, 3, 1, 1)  # of red, green and blue: Smith 1978, without its cases
    place = torch.remainder(sixths.unsqueeze(1) + 6 * turns + offsets, 6)
    return torch.addcmul(high.unsqueeze(1), chroma.unsqueeze(1), torch.minimum(place, 4 - place).clamp_(0, 1), value=-1)


OPERATIONS = (brightness, contrast, saturation, hue)
