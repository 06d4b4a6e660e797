"""Flatness on a sphere: how far the loss rises at distance gamma from a minimum, in a random direction."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.errors import UserError, choose
from flatlab.landscape import Landscape
from flatlab.metrics.results import Cost, FloatArray, Report, Sampled
from flatlab.seeds import base_seed, generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Normalisation = Literal["none", "filter"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SphereFlatness(Sampled):
    """F_gamma(w) = E L(w + gamma u) - L(w) over unit vectors u, in nats (arXiv 2410.06020, Eq. 5).

    Attributes:
        samples: (K, R, S) rise of the loss along ray k, at radius r, in stratum s.
        radii: (R,) Euclidean distances; with ``normalisation="filter"`` relative radii rho.
        strata: names (S,) of the strata; they weigh equally in ``value``.
        base_loss: (S,) mean loss at w.
        normalisation: ``"none"``: w + gamma u; ``"filter"``: w + rho z, z as long as w in each filter.
        seed: names the rays; equal seeds walk equal rays.
        num_params: P, the dimension of the sphere's space.
        norm: Euclidean length of w.
        reach: Euclidean distance at radius 1: one, or the length of the filters of w.
        space: what was moved, ``"weights"`` or, of a quantized network, ``"baked"`` or ``"latent"``.
    """

    radii: FloatArray
    strata: tuple[str, ...]
    base_loss: FloatArray
    normalisation: Normalisation
    seed: int
    num_params: int
    norm: float
    reach: float = 1.0
    space: str = "weights"

    @classmethod
    def from_samples(
        cls,
        landscape: Landscape,
        radii: npt.ArrayLike,
        samples: FloatArray,
        *,
        seed: int,
        normalisation: Normalisation = "none",
        seconds: float = 0.0,
    ) -> "SphereFlatness":
        """Assemble a result from the rises (K, R, S) of any blocks of rays, in their order from ray 0.

        Raises:
            UserError: if the shape is not (K, R, S) with at least two rays.
        """
        places, strata = _radii(radii), landscape.strata
        if samples.ndim != 3 or samples.shape[1:] != (len(places), len(strata)) or len(samples) < 2:
            raise UserError(
                f"The samples must have shape (K >= 2, {len(places)}, {len(strata)}): rays, radii, strata;"
                f" {samples.shape} came."
            )
        passes = 1 + len(samples) * np.count_nonzero(places)  # one at the point itself, none at radius 0
        return cls(
            samples=samples,
            cost=Cost(float(passes), int(passes) * landscape.num_samples, 0, seconds),
            radii=places,
            strata=strata,
            base_loss=landscape.base_loss,
            normalisation=normalisation,
            seed=seed,
            num_params=landscape.num_params,
            norm=landscape.norm,
            reach=_reach(landscape, normalisation),
        )

    @property
    def draws(self) -> FloatArray:
        """Rises (K, R), the mean over the strata."""
        return np.asarray(self.samples.mean(axis=2))

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.radii

    @property
    def num_samples(self) -> int:
        """How many rays were walked, K."""
        return len(self.samples)

    @property
    def relative_radii(self) -> FloatArray:
        """The Euclidean distances (R,) as shares of the length of w."""
        return np.asarray(self.radii * (self.reach / self.norm))

    @property
    def rms(self) -> FloatArray:
        """The Euclidean distances (R,) per parameter, |w' - w| / sqrt(P)."""
        return np.asarray(self.radii * (self.reach / np.sqrt(self.num_params)))

    def of(self, strata: str | Iterable[str]) -> "SphereFlatness":
        """Return the same measurement on some of the strata, such as the source domains.

        Raises:
            UserError: if a name is unknown, or none is given.
        """
        asked = [strata] if isinstance(strata, str) else list(strata)
        names = tuple(dict.fromkeys(choose("stratum", name, self.strata) for name in asked))
        if not names:
            raise UserError(f"No stratum was named; there are {', '.join(self.strata)}.")
        rows = [self.strata.index(name) for name in names]
        return replace(self, samples=self.samples[:, :, rows], base_loss=self.base_loss[rows], strata=names)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw F over the radius, with its 95 % interval over directions as a band."""
        axes = super().plot(ax)
        axes.set_xlabel("radius γ (L2)" if self.normalisation == "none" else "relative radius ρ")
        axes.set_ylabel("rise of the loss (nats)")
        return axes


@dataclass(frozen=True, eq=False, kw_only=True)
class PairedDifference(Sampled):
    """F of one model less F of another, ray by ray: what the rays have in common drops out.

    Attributes:
        samples: (K, R) differences of the rises, in nats.
        radii: (R,) as in the two measurements.
    """

    radii: FloatArray

    @property
    def draws(self) -> FloatArray:
        """The differences themselves."""
        return self.samples

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.radii


def sphere_flatness(
    landscape: Landscape,
    radii: npt.ArrayLike,
    *,
    num_samples: int = 100,
    seed: int | torch.Generator = 0,
    normalisation: Normalisation = "none",
    report: Report | None = None,
) -> SphereFlatness:
    """Measure F_gamma(w), the mean rise of the loss on spheres around w (arXiv 2410.06020, Eq. 5).

    The plain crossed design: each of `num_samples` rays meets every radius and all the data, so that a curve over
    the radius is smooth and two models can be compared ray by ray. On a quadratic loss with Hessian H,
    F = gamma^2 tr(H) / (2 P).

    Args:
        landscape: the loss around w.
        radii: (R,) distances gamma, or relative radii rho with ``normalisation="filter"``.
        num_samples: K, how many rays; the interval speaks of them.
        seed: names the rays; the same for all models that are to be compared.
        normalisation: ``"filter"`` takes the scale of the weights out (Dinh et al. 2017; Li et al. 2018).
        report: called as ``report(done, total)`` after each ray.

    Raises:
        UserError: if a radius is negative or not finite, or fewer than two rays are asked for.
    """
    if num_samples < 2:
        raise UserError(f"num_samples must be at least 2, since an interval needs a spread, but is {num_samples}.")
    start, seed = time.perf_counter(), base_seed(seed)
    samples = sample_rays(landscape, radii, range(num_samples), seed=seed, normalisation=normalisation, report=report)
    seconds = time.perf_counter() - start
    return SphereFlatness.from_samples(
        landscape, radii, samples, seed=seed, normalisation=normalisation, seconds=seconds
    )


def sample_rays(
    landscape: Landscape,
    radii: npt.ArrayLike,
    rays: Sequence[int],
    *,
    seed: int,
    normalisation: Normalisation = "none",
    report: Report | None = None,
) -> FloatArray:
    """Return the rises of the loss (len(rays), R, S) along some of the rays.

    Ray k depends on the seed and k alone, so that blocks of rays may be measured in any order and place.
    """
    _known(normalisation, landscape)
    places, base = _radii(radii), landscape.base_loss
    rises = np.zeros((len(rays), len(places), len(landscape.strata)))
    with landscape.moving() as at, np.errstate(invalid="ignore"):
        for row, k in enumerate(rays):
            direction = draw_ray(landscape, seed, k, normalisation=normalisation)
            for column in np.flatnonzero(places):
                rises[row, column] = at(direction, float(places[column])) - base
            if report is not None:
                report(row + 1, len(rays))
    return rises


def draw_ray(landscape: Landscape, seed: int, k: int, *, normalisation: Normalisation = "none") -> Tensor:
    """Return direction k (P,): of length 1, or with ``"filter"`` as long as w in each filter.

    Drawn on the CPU in float32, whatever the model's device and dtype: all models of one architecture share rays.
    """
    normal = torch.randn(landscape.num_params, generator=generator("sphere", seed, k))
    if normalisation == "filter":
        return scale_filters(normal, landscape)
    length = torch.linalg.vector_norm(normal, dtype=torch.float64)
    return landscape.as_point(normal.div_(length))


def scale_filters(vector: Tensor, landscape: Landscape) -> Tensor:
    """Scale each filter of a direction (P,) to the length of the same filter of w (arXiv 1712.09913, section 4).

    A filter is a slice along the first axis of a tensor of more than one axis; BatchNorm and biases are held still.
    """
    scaled = landscape.as_point(vector).clone()
    for z, w in zip(landscape.split(scaled), landscape.split(landscape.point), strict=True):
        if w.ndim < 2:
            z.zero_()
        else:
            z.mul_(_lengths(w) / _lengths(z))
    return scaled


def paired_difference(a: SphereFlatness, b: SphereFlatness) -> PairedDifference:
    """Return the difference a - b along the rays that both have walked.

    Raises:
        UserError: if the two were not measured along the same rays, at the same radii.
    """
    for name in ("seed", "normalisation", "num_params", "num_samples", "radii"):
        of_a, of_b = getattr(a, name), getattr(b, name)
        if not np.array_equal(of_a, of_b):
            raise UserError(
                f"A paired difference needs the same rays, but {name} differs ({of_a} and {of_b}):"
                f" measure both with one {name}."
            )
    return PairedDifference(samples=a.draws - b.draws, cost=a.cost + b.cost, radii=a.radii)


def _lengths(tensor: Tensor) -> Tensor:
    """Return the length of each filter, in float64 and shaped to scale the tensor."""
    axes = tuple(range(1, tensor.ndim))
    lengths: Tensor = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True, dtype=torch.float64)
    return lengths


def _reach(landscape: Landscape, normalisation: Normalisation) -> float:
    if normalisation == "none":
        return 1.0
    filters = [w for w in landscape.split(landscape.point) if w.ndim > 1]
    return float(torch.stack([_lengths(w).square().sum() for w in filters]).sum().sqrt())


def _radii(radii: npt.ArrayLike) -> FloatArray:
    places = np.atleast_1d(np.asarray(radii, dtype=np.float64))
    if places.ndim != 1 or not places.size or not np.isfinite(places).all() or (places < 0).any():
        raise UserError(f"The radii must be finite numbers of at least 0, one or more, but {radii!r} came.")
    return places


def _known(normalisation: str, landscape: Landscape) -> None:
    if normalisation not in get_args(Normalisation):
        known = ", ".join(get_args(Normalisation))
        raise UserError(f"Unknown normalisation {normalisation!r}; known: {known}.")
    if normalisation == "filter" and all(w.ndim < 2 for w in landscape.split(landscape.point)):
        raise UserError(
            'normalisation="filter" moves tensors of more than one axis, but the landscape has none: write "none".'
        )
