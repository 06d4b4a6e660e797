"""Curvature in units that are stored, so that a resumed measurement gives the same numbers.

The method of products is chosen by timing, and methods differ in rounding; therefore the choice is stored first.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np

from flatlab.arguments import FloatArray
from flatlab.derivatives.operators import Hessian
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.density import quadrature
from flatlab.metrics.curvature.eigenvalues import hessian_spectrum
from flatlab.metrics.curvature.krylov import resolution
from flatlab.metrics.curvature.trace import BUDGET, hessian_trace, packed, unpacked
from flatlab.metrics.units import Keep
from flatlab.results.estimate import Cost
from flatlab.results.spectrum import SpectralDensity, Trace

STOPS = ("accuracy", "budget", "exact")


class KeptHessian:
    """The Hessian of a landscape, whose measurements are units; it is built only if one is missing.

    Args:
        landscape: around the point.
        keep: stores units.
        name: prefix of the units' names.
    """

    def __init__(self, landscape: Landscape, keep: Keep, *, name: str = "") -> None:
        self.landscape, self.keep, self.name = landscape, keep, name
        self.operator = cache(self._operator)

    def trace(self, *, rel_error: float, seed: int, budget: int = BUDGET) -> Trace:
        """Return `hessian_trace`, one unit."""
        begin = time.perf_counter()

        def make() -> FloatArray:
            found = hessian_trace(self.operator(), rel_error=rel_error, seed=seed, budget=budget)
            return packed(found, found.basis, STOPS.index(found.stopped), found.cost.hvps)

        (kept,) = self.keep([(f"{self.name}trace", make)])
        basis, stopped, hvps = kept[:3].astype(int).tolist()
        return unpacked(
            kept[3:],
            basis=basis,
            rel_error=rel_error,
            stopped=STOPS[stopped],
            seed=seed,
            num_params=self.landscape.num_params,
            cost=Cost(hvps=hvps, seconds=time.perf_counter() - begin),
        )

    def density(self, *, num_vectors: int, steps: int, seed: int) -> SpectralDensity:
        """Return `spectral_density`, one unit for each start."""
        begin = time.perf_counter()

        def rule(index: int) -> Callable[[], FloatArray]:
            return lambda: np.stack(quadrature(self.operator(), seed, index, steps=steps))

        rules = list(self.keep([(f"{self.name}density-{index}", rule(index)) for index in range(num_vectors)]))
        largest = max(float(np.abs(nodes).max()) for nodes, _ in rules)
        floor = resolution(self.landscape.point) * largest
        found = SpectralDensity.of_rules(rules, seed=seed, num_params=self.landscape.num_params, floor=floor)
        return replace(found, cost=replace(found.cost, seconds=time.perf_counter() - begin))

    def top(self, *, tol: float, seed: int) -> tuple[float, Cost]:
        """Return the largest eigenvalue, one unit, and its products."""

        def make() -> FloatArray:
            found = hessian_spectrum(self.operator(), k=1, tol=tol, seed=seed)
            return np.array([found.eigenvalues[0], found.cost.hvps])

        (kept,) = self.keep([(f"{self.name}top", make)])
        return float(kept[0]), Cost(hvps=int(kept[1]))

    def _operator(self) -> Hessian:
        (forward,) = self.keep(
            [(f"{self.name}method", lambda: np.array([Hessian(self.landscape).method == "forward"], float))]
        )
        return Hessian(self.landscape, method="forward" if forward[0] else "reverse")
