"""The embedded data: scikit-learn's 1,797 handwritten digits in four domains, one for each angle of rotation.

Each digit belongs to one domain only, as in RotatedMNIST, so that no two domains share an image.
"""

import numpy as np
import torch

from flatlab.data.domains import Domain, DomainSet

SIZE = 16  # pixels on a side, twice scikit-learn's: a rotated 8 x 8 digit is hardly legible
ANGLES = {"rot0": 0, "rot15": 15, "rot30": 30, "rot45": 45}  # degrees, counter-clockwise
MEAN, STD = 0.288, 0.311  # of all pixels of the four domains, measured


def load() -> DomainSet:
    """Return the digits as (N, 1, 16, 16) bytes; the same bytes at each call."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = _parts(digits.target, len(ANGLES))
    domains = tuple(
        Domain(name, _render(digits.images[rows], angle), torch.from_numpy(digits.target[rows].astype(np.int64)))
        for (name, angle), rows in zip(ANGLES.items(), parts, strict=True)
    )
    return DomainSet("digits", domains, tuple(map(str, digits.target_names)), mean=(MEAN,), std=(STD,))


def _parts(labels: np.ndarray, count: int) -> list[np.ndarray]:
    """Split the row numbers evenly by class: sizes and class counts differ by at most one.

    The shuffle before the sort separates the digits of one writer, which are consecutive in scikit-learn's order.
    """
    shuffled = np.random.RandomState(0).permutation(len(labels))  # RandomState: its stream never changes
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return [by_class[part::count] for part in range(count)]


def _render(images: np.ndarray, angle: int) -> torch.Tensor:
    """Return (N, 8, 8) images of levels 0 to 16 as (N, 1, 16, 16) bytes, rotated by `angle` degrees.

    Bilinear interpolation stays within the levels: cubic overshoots by a fifth of the range at the edges of strokes.
    """
    from scipy import ndimage

    scale = SIZE // images.shape[-1]
    large = ndimage.zoom(images, (1, scale, scale), order=1, mode="nearest", grid_mode=True)
    turned = ndimage.rotate(large, angle, axes=(2, 1), reshape=False, order=1)
    return torch.from_numpy(np.rint(turned * (255 / 16)).astype(np.uint8)).unsqueeze(1)
