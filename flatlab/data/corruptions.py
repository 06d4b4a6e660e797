"""Common corruptions of images, each in five severities (Hendrycks and Dietterich 2019), as unseen domains.

Images of at most 64 pixels on a side: our own code, with the constants of CIFAR-10-C FOUND in hendrycks/robustness
(make_cifar_c.py, ca36008). Differences: values are rounded, not truncated; enlargements are centred; glass_blur swaps
pixels, where the original, through views of numpy, copies one of the two. Not included: snow, frost,
elastic_transform, spatter and saturate. The mean squared error increases with the severity (measured on digits), except
for two corruptions, whose published constants do not order it. glass_blur: the error is mostly that of the swaps, once
in severities 1 to 3 and twice in 4 and 5, and the blur, which becomes wider from 1 to 3 and from 4 to 5, reduces it.
motion_blur: severities 3 and 4 have the same width and differ only in the cutoff of its weights, where these vanish.

Larger images: the package imagecorruptions, whose constants are for 224 pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from flatlab.data.domains import Domain, DomainSet
from flatlab.data.images import Decoded
from flatlab.errors import UserError, choose
from flatlab.seeds import derive

Pixels = npt.NDArray[np.float64]  # (C, H, W), scaled to [0, 1]
Draws = np.random.RandomState  # its stream never changes
SMALL = 64  # pixels on a side: larger images are photographs
SEVERITIES = 5
SEEDED = ("impulse_noise", "glass_blur")  # imagecorruptions takes their seed as an argument, not from numpy's generator
PHOTOGRAPHS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    *("speckle_noise", "gaussian_blur", "spatter", "saturate"),
)


def gaussian_noise(x: Pixels, std: float, draws: Draws) -> Pixels:
    """Add normal noise."""
    return x + draws.normal(scale=std, size=x.shape)


def shot_noise(x: Pixels, count: float, draws: Draws) -> Pixels:
    """Draw each value from a Poisson distribution of mean `x * count`, divided by `count`."""
    return draws.poisson(x * count) / count


def impulse_noise(x: Pixels, share: float, draws: Draws) -> Pixels:
    """Set half of a share of the values to 0, and the other half to 1."""
    u = draws.uniform(size=x.shape)
    return np.where(u < share / 2, 0.0, np.where(u < share, 1.0, x))


def speckle_noise(x: Pixels, std: float, draws: Draws) -> Pixels:
    """Multiply by one plus normal noise."""
    return x * (1 + draws.normal(scale=std, size=x.shape))


def gaussian_blur(x: Pixels, sigma: float, draws: Draws) -> Pixels:
    """Blur by a Gaussian of `sigma` pixels."""
    del draws
    blurred: Pixels = ndimage.gaussian_filter(x, (0, sigma, sigma), mode="nearest")
    return blurred


def defocus_blur(x: Pixels, lens: tuple[float, float], draws: Draws) -> Pixels:
    """Blur by a disk of a radius (pixels), which is itself blurred over three pixels by a Gaussian."""
    del draws
    radius, alias = lens
    reach = np.arange(-8, 9)
    disk = (reach[:, None] ** 2 + reach**2 <= radius**2).astype(float)
    edge = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * alias**2))
    kernel = ndimage.convolve(disk / disk.sum(), np.outer(edge, edge) / edge.sum() ** 2, mode="constant")
    return np.stack([ndimage.convolve(channel, kernel, mode="mirror") for channel in x])


def glass_blur(x: Pixels, glass: tuple[float, int, int], draws: Draws) -> Pixels:
    """Blur, swap each pixel with a near one (at most `reach` up and left) `times` times, and blur again."""
    sigma, reach, times = glass
    blurred = gaussian_blur(x, sigma, draws).copy()
    height, width = x.shape[1:]
    for _ in range(times):
        for row in range(height - reach, reach, -1):
            moves = draws.randint(-reach, reach, size=(width, 2))
            for column in range(width - reach, reach, -1):
                down, right = moves[column - 1]
                here, there = (row, column), (row + down, column + right)
                blurred[:, *here], blurred[:, *there] = blurred[:, *there].copy(), blurred[:, *here].copy()
    return gaussian_blur(blurred, sigma, draws)


def motion_blur(x: Pixels, motion: tuple[int, float], draws: Draws) -> Pixels:
    """Average along a line of 2 `radius` + 1 pixels, at -45 to 45 degrees, with one-sided Gaussian weights."""
    radius, sigma = motion
    angle = np.deg2rad(draws.uniform(-45, 45))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    moved = (
        ndimage.shift(x, (0, step * np.sin(angle), step * np.cos(angle)), order=1, mode="nearest") for step in steps
    )
    return np.asarray(sum(w * each for w, each in zip(weights / weights.sum(), moved, strict=True)))


def zoom_blur(x: Pixels, count: int, draws: Draws) -> Pixels:
    """Average over the image and enlargements of it by 0, 1, ... `count` - 1 percent."""
    del draws
    centre = (np.array(x.shape[1:]) - 1) / 2
    total = x.copy()
    for factor in 1 + 0.01 * np.arange(count):
        offset = centre - centre / factor
        total += ndimage.affine_transform(x, [1, 1 / factor, 1 / factor], [0, *offset], order=1, mode="nearest")
    return total / (count + 1)


def fog(x: Pixels, air: tuple[float, float], draws: Draws) -> Pixels:
    """Add a random cloud of values up to `height`, rougher for a smaller `decay`, and rescale to the maximum of `x`."""
    height, decay = air
    cloud = height * _cloud(max(x.shape[1:]), decay, draws)[: x.shape[1], : x.shape[2]]
    brightest = float(x.max())
    return (x + cloud) * (brightest / (brightest + height))


def _cloud(size: int, decay: float, draws: Draws) -> Pixels:
    """Return a periodic random surface in [0, 1] by midpoint displacement (diamond-square)."""
    side = 1 << (size - 1).bit_length()
    surface, step, height = np.zeros((side, side)), side, 100.0

    def displaced(total: Pixels) -> Pixels:
        return total / 4 + height * draws.uniform(-height, height, total.shape)

    while step >= 2:
        half = step // 2
        corners = surface[::step, ::step]
        across = corners + np.roll(corners, -1, axis=0)
        surface[half::step, half::step] = displaced(across + np.roll(across, -1, axis=1))
        centres = surface[half::step, half::step]
        above = centres + np.roll(centres, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        surface[::step, half::step] = displaced(above)
        beside = centres + np.roll(centres, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        surface[half::step, ::step] = displaced(beside)
        step, height = half, height / decay
    surface -= surface.min()
    return surface / float(surface.max())


def brightness(x: Pixels, more: float, draws: Draws) -> Pixels:
    """Add to V of HSV, the largest channel of each pixel."""
    del draws
    value: Pixels = x.max(axis=0)
    raised = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: Pixels, share: float, draws: Draws) -> Pixels:
    """Multiply the deviations from each channel's mean by a share."""
    del draws
    mean: Pixels = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * share + mean


def jpeg_compression(x: Pixels, quality: int, draws: Draws) -> Pixels:
    """Compress as JPEG."""
    del draws
    file = BytesIO()
    picture = _picture(x)
    picture.save(file, "JPEG", quality=quality)
    return _pixels(Image.open(file))


def pixelate(x: Pixels, share: float, draws: Draws) -> Pixels:
    """Reduce the number of pixels along each side to a share of it by averaging, and enlarge again."""
    del draws
    picture = _picture(x)
    width, height = picture.size
    small = picture.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
    return _pixels(small.resize((width, height), Image.Resampling.BOX))


def _picture(x: Pixels) -> Image.Image:
    array = np.rint(x * 255).astype(np.uint8)
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def _pixels(picture: Image.Image) -> Pixels:
    array = np.asarray(picture) / 255
    return np.atleast_3d(array).transpose(2, 0, 1)


Act = Callable[[Pixels, Any, Draws], Pixels]
SMALL_IMAGES: dict[str, tuple[Act, tuple[Any, ...]]] = {  # -> the constants of the severities 1 to 5
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (6, 11, 16, 21, 26)),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
}


class Corruption(NamedTuple):
    """One corruption at one severity.

    Attributes:
        name: such as "gaussian_noise".
        severity: 1 to 5.
        seed: seed of its random draws, which are the same at each severity.
    """

    name: str
    severity: int
    seed: int = 0

    @classmethod
    def of(cls, text: str, size: int) -> "Corruption":
        """Return the corruption named by NAME:SEVERITY, for images of a size.

        Args:
            text: such as "gaussian_noise:3".
            size: pixels on a side.

        Raises:
            UserError: if there is no such corruption or severity, or a package is missing.
        """
        name, _, severity = text.partition(":")
        proper = choose("corruption", name, SMALL_IMAGES if size <= SMALL else PHOTOGRAPHS)
        if severity not in map(str, range(1, SEVERITIES + 1)):
            raise UserError(f"The severity must be an integer from 1 to {SEVERITIES}, got {text!r}: write {proper}:3.")
        if size > SMALL:
            _photographs()
        return cls(proper, int(severity))

    def each(self, images: Tensor, domain: str, rows: Iterable[int]) -> Tensor:
        """Return corrupted images, (N, C, H, W) uint8; equal rows of a domain have equal draws.

        Args:
            images: (N, C, H, W) uint8.
            domain: name of their domain.
            rows: row number of each.
        """
        return torch.stack([self.apply(image, domain, row) for image, row in zip(images, rows, strict=True)])

    def apply(self, image: Tensor, *key: object) -> Tensor:
        """Return a corrupted image, (C, H, W) uint8.

        Args:
            image: (C, H, W) uint8, of at least 16 pixels on a side.
            key: identifies the image; equal keys give equal draws.
        """
        seed = derive("corruption", self.name, self.seed, *key) % 2**32
        pixels = image.cpu().numpy()
        if max(image.shape[-2:]) > SMALL:
            return torch.from_numpy(_photograph(pixels, self, seed)).to(image.device)
        act, constants = SMALL_IMAGES[self.name]
        found = act(pixels / 255, constants[self.severity - 1], Draws(seed))
        return torch.from_numpy(np.rint(found.clip(0, 1) * 255).astype(np.uint8)).to(image.device)


def _photographs() -> ModuleType:
    try:
        import imagecorruptions
    except ModuleNotFoundError:
        raise UserError(
            f"Corruptions of images of more than {SMALL} pixels need the package imagecorruptions: "
            "pip install 'flatlab[corruptions]', or choose a smaller --image-size."
        ) from None
    module: ModuleType = imagecorruptions
    return module


def _photograph(pixels: npt.NDArray[np.uint8], corruption: Corruption, seed: int) -> npt.NDArray[np.uint8]:
    own = {"seed": seed} if corruption.name in SEEDED else {}
    picture = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    with _numpy_seeded(seed):
        found = _photographs().corrupt(picture, corruption_name=corruption.name, severity=corruption.severity, **own)
    return np.ascontiguousarray(found.transpose(2, 0, 1)[: len(pixels)])


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, and restore its state afterwards."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def corrupted(data: DomainSet, text: str, rows: Mapping[str, npt.NDArray[np.int64]]) -> DomainSet:
    """Return rows of domains, in their order, as a data set of corrupted images; equal rows have equal draws.

    Args:
        data: the data set.
        text: the corruption, such as "gaussian_noise:3".
        rows: the rows to keep, by domain.

    Raises:
        UserError: if there is no such corruption or severity, a package is missing, or the data are sentences.
    """
    found = _corruption_for(data, text)
    domains = (_corrupted(data.domain(name), found, torch.from_numpy(each)) for name, each in rows.items())
    return replace(data, name=f"{data.name}, {text}", domains=tuple(domains), stamp=None)


def with_corrupted(data: DomainSet, text: str, name: str) -> DomainSet:
    """Return the data set with all images of one domain corrupted, with the same draws as in `corrupted`.

    The fingerprint remains that of the images as they are. Files that are decoded on access are also corrupted on
    access.

    Args:
        data: the data set.
        text: the corruption, such as "gaussian_noise:3".
        name: the domain.

    Raises:
        UserError: if there is no such corruption or severity, a package is missing, or the data are sentences.
    """
    found = _corruption_for(data, text)
    domain = data.domain(name)
    images = domain.images
    if isinstance(images, Decoded):
        changed = replace(domain, images=CorruptedFiles(images, found, name), originals=None)
    else:
        changed = replace(domain, images=found.each(images, name, range(len(domain))), originals=None)
    domains = tuple(changed if each is domain else each for each in data.domains)
    return replace(data, domains=domains, stamp=data.fingerprint)


class CorruptedFiles(Decoded):
    """Image files that are decoded and corrupted on each access.

    Args:
        files: the files.
        corruption: the corruption.
        name: name of the domain.
    """

    def __init__(self, files: Decoded, corruption: Corruption, name: str) -> None:
        super().__init__(files.paths, files.size, files.device)
        self.corruption, self.name = corruption, name

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Return the corrupted squares of these rows, (n, 3, size, size) uint8."""
        return self.corruption.each(super().__getitem__(rows), self.name, rows.tolist())

    def to(self, device: torch.device) -> "CorruptedFiles":
        """Return the same files, their images on a device."""
        return CorruptedFiles(super().to(device), self.corruption, self.name)


def _corruption_for(data: DomainSet, text: str) -> Corruption:
    shape = data.domains[0].images.shape
    if len(shape) < 4:
        raise UserError(f"Corruptions change images, and {data.name} has sentences; leave --corruption {text} out.")
    return Corruption.of(text, max(shape[-2:]))


def _corrupted(domain: Domain, corruption: Corruption, rows: Tensor) -> Domain:
    return Domain(domain.name, corruption.each(domain.images[rows], domain.name, rows.tolist()), domain.labels[rows])
