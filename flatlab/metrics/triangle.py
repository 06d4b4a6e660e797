"""Three ways to one number: the rise on small spheres, the trace, and the first moment of the eigenvalues' density.

On a quadratic loss F_gamma = gamma^2 tr(H) / (2 P), so that 2 P F / gamma^2, tr(H) and P times the mean eigenvalue are
one number. They are measured from independent draws; where they disagree, one of them is wrong, or the loss is not
what its second derivatives say. The latter is so for ReLU and max pooling: their kinks add to the rise at any finite
radius, and autograd does not see them.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import stdtrit
from torch import nn

from flatlab.arguments import distances
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.density import SpectralDensity
from flatlab.metrics.keeping import KeptHessian
from flatlab.metrics.results import Estimate, FloatArray, Sampled
from flatlab.metrics.sampling import Keep, Sampler, forget
from flatlab.metrics.sphere import SphereFlatness, sample
from flatlab.metrics.trace import Trace
from flatlab.seeds import base_seed

RISES = (1e-3, 1.0, 7)  # nats that a quadratic would rise by at the radii, and how many there are
WITHIN = 0.1  # of the trace: how far the rise may be off where the quadratic picture is said to hold
KINKS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True, eq=False, kw_only=True)
class Triangle(Sampled):
    """The trace of the Hessian, three times, and what the rise says of it at growing radii.

    Attributes:
        flatness: F on spheres, the first corner at its smallest radius.
        trace: the second corner.
        density: the third.
        kinks: names of modules that are not smooth; those called as functions are not found.
    """

    flatness: SphereFlatness
    trace: Trace
    density: SpectralDensity
    kinks: tuple[str, ...]

    @property
    def estimates(self) -> list[Estimate]:
        """2 P F / gamma^2 at each radius."""
        scales = 2 * self.flatness.num_params / self.flatness.radii**2
        return [_times(each, float(s)) for each, s in zip(self.flatness.estimates, scales, strict=True)]

    @property
    def raw(self) -> list[FloatArray]:
        """The rises."""
        return self.flatness.raw

    @property
    def axis(self) -> tuple[str, FloatArray]:
        """The radii."""
        return "radius", self.flatness.radii

    @property
    def corners(self) -> dict[str, Estimate]:
        """The three estimates of tr(H)."""
        moment = _times(self.density.moment(1), self.density.num_params)
        return {"sphere": self.estimates[0], "trace": self.trace.trace, "density": moment}

    def differences(self, level: float = 0.95) -> dict[tuple[str, str], tuple[float, float, float]]:
        """Return each difference with its interval (value, low, high); all three hold together at this level."""
        found = {}
        each = 1 - (1 - level) / 3  # Bonferroni
        for (a, one), (b, other) in combinations(self.corners.items(), 2):
            value, half = one.value - other.value, _half(one, other, each)
            found[a, b] = (value, value - half, value + half)
        return found

    def agrees(self, level: float = 0.95) -> bool:
        """Say whether no two of the three differ by more than their intervals."""
        return all(low <= 0 <= high for _, low, high in self.differences(level).values())

    def quadratic_radius(self, within: float = WITHIN, level: float = 0.95) -> float:
        """Return the largest radius up to which the rise is that of a quadratic, or 0.

        So it is where the interval of 2 P F / gamma^2 - tr(H) reaches into +- `within` tr(H), at it and at each
        smaller radius.
        """
        trace, reached = self.trace.trace, 0.0
        for radius, found in zip(self.flatness.radii.tolist(), self.estimates, strict=True):
            off = abs(found.value - trace.value) - _half(found, trace, level)
            if not off <= within * abs(trace.value):
                break
            reached = radius
        return reached

    def verdict(self, level: float = 0.95) -> str:
        """Say in a sentence or two whether the three agree, and how far the quadratic picture holds."""
        told = ", ".join(
            f"{name} {each.value:.4g} ± {each.half_width(level):.2g}" for name, each in self.corners.items()
        )
        agree = "agree within their intervals" if self.agrees(level) else "do not agree"
        radius = self.quadratic_radius(level=level)
        norm = self.flatness.norm
        share = f" ({radius / norm:.2%} of the weights' norm)" if norm else ""
        far = f"up to radius {radius:.3g}{share}" if radius else "at none of the radii"
        parts = [f"Trace of the Hessian: {told}: they {agree}.", f"The quadratic picture holds to {WITHIN:.0%} {far}."]
        if self.kinks and not (self.agrees(level) and radius):
            parts.append(
                " and ".join(self.kinks) + " bend the loss in kinks, which add to the rise and not to the trace."
            )
        return " ".join(parts)


def triangle(
    landscape: Landscape,
    *,
    radii: npt.ArrayLike | None = None,
    rel_error: float = 0.05,
    density: tuple[int, int] = (32, 3),
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
) -> Triangle:
    """Measure the trace of the Hessian in three ways, from independent draws.

    Args:
        landscape: of a smooth loss: see above for ReLU.
        radii: of the spheres, ascending; by default seven at which a quadratic of the measured trace rises by 0.001 to
            1 nat.
        rel_error: standard error that rise and trace are measured to.
        density: starts and Lanczos steps of the density; its first moment rests on the starts alone.
        seed: names the three draws, which share nothing.
        keep: keeps units: of the sphere's sampling, trace and density, and how products are made.

    Raises:
        UserError: where the radii are not positive, or the loss has no curvature to compare.
    """
    name, hessian = base_seed(seed), KeptHessian(landscape, keep)
    trace = hessian.trace(rel_error=rel_error, seed=name)
    spectrum = hessian.density(num_vectors=density[0], steps=density[1], seed=name)
    places = _radii(landscape, trace) if radii is None else np.sort(distances("radii", radii, above=0.0))
    sampler = Sampler([landscape], name, "none", keep=keep)
    (flatness,) = sample(sampler, places, None, (rel_error, 0.0), None)
    return Triangle(
        cost=flatness.cost + trace.cost + spectrum.cost,
        flatness=flatness,
        trace=trace,
        density=spectrum,
        kinks=kinks_of(landscape.model),
    )


def kinks_of(model: nn.Module) -> tuple[str, ...]:
    """Return the kinds of modules in a model that are not smooth."""
    return tuple(sorted({type(m).__name__ for m in model.modules() if isinstance(m, (*KINKS, *POOLS))}))


def _radii(landscape: Landscape, trace: Trace) -> FloatArray:
    size = abs(trace.trace.value)
    if not size > 0:
        raise UserError(
            "The trace of the Hessian is zero or not finite here, so that no radius suits it: hand in radii."
        )
    return np.asarray(np.sqrt(2 * landscape.num_params * np.geomspace(*RISES) / size))


def _times(found: Estimate, factor: float) -> Estimate:
    return Estimate(found.value * factor, found.stderr * factor, found.freedom)


def _half(one: Estimate, other: Estimate, level: float) -> float:
    """Return half the interval of a difference of independent estimates (Welch 1947)."""
    squares = np.array([one.stderr, other.stderr]) ** 2
    if not squares.sum() > 0:
        return 1e-9 * max(abs(one.value), abs(other.value))  # both exact: rounding
    freedom = squares.sum() ** 2 / (squares**2 / [one.freedom, other.freedom]).sum()
    return float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(squares.sum()))
