"""The values of a landscape at a point, and the interface to evaluate many points."""

from dataclasses import dataclass
from typing import Protocol

import numpy.typing as npt
from torch import Tensor

from flatlab.arguments import FloatArray
from flatlab.landscape.blocks import Gathered


class Move(Protocol):
    """Stratum losses (..., S) at point + radius * direction, for one radius or several: all samples, or a block's."""

    def __call__(  # noqa: D102
        self, direction: Tensor, radius: npt.ArrayLike = 1.0, *, block: Gathered | None = None
    ) -> FloatArray: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Loss and accuracy at one point; strata have equal weight in ``loss`` (nats) and ``accuracy`` (share)."""

    loss: float
    accuracy: float | None
    losses: FloatArray
    """(S,) mean loss of each stratum."""
    accuracies: FloatArray | None
    """(S,), or None if the outputs are not class scores."""
