"""The trace of the Hessian in three independent ways."""

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.results.estimate import Cost, Estimate, Sampled, axes_of, check_level
from flatlab.results.spectrum import SpectralDensity, Trace
from flatlab.results.sphere import SphereFlatness

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RULE = "rule-"
WITHIN = 0.1  # of the trace: how far the rise may be off where the quadratic approximation is called valid


@dataclass(frozen=True, eq=False, kw_only=True)
class TraceCheck(Sampled):
    """Three estimates of the Hessian's trace, and the estimate from the rise at growing radii.

    Attributes:
        flatness: F on spheres, the first estimate at its smallest radius.
        trace: the second estimate.
        density: the third.
        kinks: names of modules that are not smooth; those called as functions are not found.
    """

    flatness: SphereFlatness
    trace: Trace
    density: SpectralDensity
    kinks: tuple[str, ...]

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file: arrays, and facts for JSON; without the seconds."""
        arrays, facts = self.flatness.to_arrays()
        arrays |= {"exact": self.trace.exact, "vectors": self.trace.vectors}
        for index, (nodes, weights) in enumerate(zip(self.density.nodes, self.density.weights, strict=True)):
            arrays[_rule(index)] = np.stack([nodes, weights])
        facts |= {"basis": self.trace.basis, "trace_stopped": self.trace.stopped, "trace_hvps": self.trace.cost.hvps}
        return arrays, {**facts, "floor": self.density.floor, "kinks": list(self.kinks)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns and the spec's fields.

        Raises:
            UserError: if the file is of an earlier version, which kept the three estimates and not their draws.
        """
        if "exact" not in arrays:
            raise UserError(
                "The draws of this trace check must be in its file, but an earlier version wrote it without: delete "
                "the measurement's file `done`, and repeat the command, which then measures again."
            )
        rules = [arrays[name] for name in sorted(arrays) if name.startswith(RULE)]
        shared = {"seed": facts["seed"], "num_params": facts["num_params"]}
        trace = Trace(
            exact=arrays["exact"],
            vectors=arrays["vectors"],
            basis=facts["basis"],
            rel_error=facts["rel_error"],
            stopped=facts["trace_stopped"],
            cost=Cost(hvps=facts["trace_hvps"]),
            **shared,
        )
        density = SpectralDensity.of_rules(rules, floor=facts["floor"], **shared)
        flatness = SphereFlatness.from_arrays(arrays, facts)
        cost = flatness.cost + trace.cost + density.cost
        return cls(flatness=flatness, trace=trace, density=density, kinks=tuple(facts["kinks"]), cost=cost)

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
        each = 1 - (1 - check_level(level)) / 3  # Bonferroni
        for (a, one), (b, other) in combinations(self.corners.items(), 2):
            value, half = one.value - other.value, _half(one, other, each)
            found[a, b] = (value, value - half, value + half)
        return found

    def apart(self, level: float = 0.95) -> list[tuple[str, str]]:
        """Return the pairs of the three that differ by more than their intervals."""
        return [pair for pair, (_, low, high) in self.differences(level).items() if not low <= 0 <= high]

    def agrees(self, level: float = 0.95) -> bool:
        """Return whether no two of the three differ by more than their intervals."""
        return not self.apart(level)

    def quadratic_radius(self, within: float = WITHIN, level: float = 0.95) -> float:
        """Return the largest radius up to which the rise is that of a quadratic, or 0.

        That is, the interval of 2 P F / gamma^2 - tr(H) overlaps +- `within` tr(H), at it and at each smaller radius.
        """
        trace, reached, level = self.trace.trace, 0.0, check_level(level)
        for radius, found in zip(self.flatness.radii.tolist(), self.estimates, strict=True):
            off = abs(found.value - trace.value) - _half(found, trace, level)
            if not off <= within * abs(trace.value):
                break
            reached = radius
        return reached

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw 2 P F / gamma^2 over the radius, the two other estimates, and the limit of the quadratic regime."""
        axes = axes_of(ax)
        low, high = self.interval()
        (line,) = axes.plot(self.flatness.radii, self.value, marker="o", label="2 P F / γ²")
        axes.fill_between(self.flatness.radii, low, high, color=line.get_color(), alpha=0.25, lw=0)
        labels = {"trace": "trace of the Hessian", "density": "density's mean × P"}
        for index, (name, label) in enumerate(labels.items(), start=1):
            axes.axhline(self.corners[name].value, color=f"C{index}", lw=1, label=label)
            axes.axhspan(*self.corners[name].interval(), color=f"C{index}", alpha=0.15, lw=0)
        if radius := self.quadratic_radius():
            axes.axvline(radius, color="0.5", ls=":", lw=1)
        axes.set_xscale("log")
        if (low > 0).all() and min(each.value for each in self.corners.values()) > 0:
            axes.set_yscale("log")
        axes.set(xlabel="radius γ (L2); dotted: limit of the quadratic regime", ylabel="trace (nats)")
        axes.legend()
        return axes

    def verdict(self, level: float = 0.95) -> str:
        """Return sentences on whether the three agree, and up to which radius the quadratic approximation is valid."""
        three = ", ".join(
            f"{name} {each.value:.4g} ± {each.half_width(level):.2g}" for name, each in self.corners.items()
        )
        apart = self.apart(level)
        which = ", ".join(" and ".join(pair) for pair in apart)
        agree = f"do not agree ({which})" if apart else "agree within their intervals"
        radius = self.quadratic_radius(level=level)
        norm = self.flatness.norm
        share = f" ({radius / norm:.2%} of the weights' norm)" if norm else ""
        far = f"up to radius {radius:.3g}{share}" if radius else "at none of the radii"
        parts = [
            f"Trace of the Hessian: {three}: they {agree}.",
            f"The quadratic approximation is valid to {WITHIN:.0%} {far}.",
        ]
        if self.kinks and not (radius and "sphere" not in sum(apart, ())):
            names = " and ".join(self.kinks)
            parts.append(f"The loss has kinks ({names}), which add to the rise and not to the trace.")
        return " ".join(parts)


def _rule(index: int) -> str:
    """Return the name of an array: nodes and weights of one start of the density."""
    return f"{RULE}{index:03d}"


def _times(found: Estimate, factor: float) -> Estimate:
    return Estimate(found.value * factor, found.stderr * factor, found.freedom)


def _half(one: Estimate, other: Estimate, level: float) -> float:
    """Return half the interval of a difference of independent estimates (Welch 1947)."""
    squares = np.array([one.stderr, other.stderr]) ** 2
    if not squares.sum() > 0:
        return 1e-9 * max(abs(one.value), abs(other.value))  # both exact: rounding
    freedom = squares.sum() ** 2 / (squares**2 / [one.freedom, other.freedom]).sum()
    return float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(squares.sum()))
