"""Averages of the weights along one trajectory: SWA, SMA, SWAD, or none.

`update(weights, step, validate)` receives the network's weights after each step; `validate()` returns the mean
validation loss (nats) of those weights over the source domains, and is computed only if it is called. `result()`
returns the averaged weights without changing the state. Buffers are averaged like weights. For averages that are not
`evaluated` during training, the loop recomputes BatchNorm's statistics at the end, unless they are frozen.
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

    evaluated: bool  # True: evaluated with the network and selected by validation; False: evaluated once, at the end

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """Receive the weights after the update of `step`."""

    def result(self) -> dict[str, Tensor]:
        """Return the averaged weights."""

    def facts(self) -> dict[str, Any]:
        """Return what the log records of the average."""

    def save(self) -> Saved:
        """Return the observer's state."""

    def load(self, saved: Saved) -> None:
        """Restore a saved state."""


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
        """Return the weights of the last update."""
        return dict(self.weights)

    def facts(self) -> dict[str, Any]:
        """Return what the log records of the average: nothing."""
        return {}

    def save(self) -> Saved:
        """Return the observer's state: none, since the weights are the network's."""
        return {}, {}

    def load(self, saved: Saved) -> None:
        """Restore a saved state."""
        del saved


class Running:
    """SWA (Izmailov et al. 2018), over every `every`-th iterate from `start` on, or SMA (Arpit et al. 2022), over all.

    SMA is evaluated during training. Before `start` the result is the last iterate.
    """

    def __init__(self, spec: AverageSpec, switch: int) -> None:
        # EoA's loop counts steps from 1, and its average includes the iterate before the start: two steps earlier.
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
        """Return the averaged weights."""
        return dict(self.mean.tensors)

    def facts(self) -> dict[str, Any]:
        """Return what the log records: the number of iterates in the average."""
        return {"averaged": self.mean.count}

    def save(self) -> Saved:
        """Return the observer's state."""
        return dict(self.mean.tensors), {"count": self.mean.count}

    def load(self, saved: Saved) -> None:
        """Restore a saved state."""
        self.mean = Mean(saved[0], saved[1]["count"])


class Beta(Running):
    """CLIPood's moving average (Shu et al. 2023) of all iterates, the initial weights included unless quantized.

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
    """Return the observer of a spec, which ignores the weights before the switch if there is one.

    Args:
        spec: spec of the average.
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
