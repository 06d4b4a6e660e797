"""Averages: observers of one trajectory, which return averaged weights.

`update(weights, step, validate)` receives the network's weights after each step; `validate()` gives the mean validation
loss of those weights over the source domains, and is computed only when asked. `result()` gives the weights handed
over, and changes nothing. Buffers are averaged like weights; where an average is not `evaluated` as it goes and
BatchNorm's statistics are not frozen, the loop recomputes those.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from flatlab.specs.run import AverageSpec
from flatlab.tensors.means import Mean, Saved, Weights
from flatlab.train.swad import Published, Released


class Average(Protocol):
    """An observer of a trajectory."""

    evaluated: bool  # at each evaluation, and selected by validation; else only at the end

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """Receive the weights after the update of `step`."""

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over."""

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log."""

    def save(self) -> Saved:
        """Return the observer's state."""

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""


class Last:
    """No average: the trajectory's own weights."""

    evaluated = True

    def __init__(self) -> None:
        self.weights: Weights = {}

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """Receive the weights after the update of `step`."""
        del step, validate
        self.weights = weights

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over."""
        return dict(self.weights)

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log."""
        return {}

    def save(self) -> Saved:
        """Return the observer's state: none, since the weights are the network's."""
        return {}, {}

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""
        del saved


class Running:
    """SWA (Izmailov et al. 2018): each `every` steps from `start` on. SMA (Arpit et al. 2022): all from `start` on.

    SMA averages buffers too, is evaluated as it goes, and before its start is the last iterate.
    """

    def __init__(self, spec: AverageSpec, switch: int) -> None:
        # EoA's loop counts from 1, and lets the iterate before its start weigh one: two earlier than the number says.
        first = spec.start if spec.kind == "swa" else max(0, spec.start - 2)
        self.start = max(first, switch)
        self.every = spec.every
        self.evaluated = spec.kind == "sma"
        self.mean = Mean()

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """Receive the weights after the update of `step`."""
        del validate
        if step < self.start:
            self.mean = Mean(dict(weights), 0)
        elif (step - self.start) % self.every == 0:
            self.mean.add(weights)

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over."""
        return dict(self.mean.tensors)

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log."""
        return {"averaged": self.mean.count}

    def save(self) -> Saved:
        """Return the observer's state."""
        return dict(self.mean.tensors), {"count": self.mean.count}

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""
        self.mean = Mean(saved[0], saved[1]["count"])


class Beta(Running):
    """CLIPood's moving average (Shu et al. 2023): all iterates, the initial weights included, where none is quantized.

    Iterate i of 0 to n weighs the density of Beta(beta, beta) at (i + 1/2) / (n + 1); at beta 1/2 the first and the
    last weigh most.
    """

    def __init__(self, spec: AverageSpec, *, updates: int) -> None:
        super().__init__(spec, 0)
        self.beta, self.updates = spec.beta, updates

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """Receive the weights after the update of `step`; -1: the initial ones."""
        del validate
        self.mean.add(weights, self.weight(step + 1))

    def weight(self, iterate: int) -> float:
        """Return the density at an iterate."""
        place = (iterate + 0.5) / (self.updates + 1)
        normaliser = math.exp(2 * math.lgamma(self.beta) - math.lgamma(2 * self.beta))
        return float((place * (1 - place)) ** (self.beta - 1)) / normaliser


def build(spec: AverageSpec, *, switch: int | None, updates: int = 0) -> Average:
    """Return the observer that a spec names; it begins at the switch where there is one.

    Args:
        spec: of the average.
        switch: step from which weights are quantized.
        updates: number of all updates, which BMA needs.
    """
    match spec.kind:
        case "swa" | "sma":
            return Running(spec, switch or 0)
        case "bma":
            return Beta(spec, updates=updates)
        case "swad":
            return Released(spec) if spec.rule == "released" else Published(spec)
        case _:
            return Last()
