"""Options of the optimizer: fields of a run's spec and of a setting, and options of the command line."""

import math
from typing import ClassVar, Literal

from pydantic import Field

from flatlab.specs.base import LARGEST_INT, Spec


class Optimizing(Spec):
    """Which optimizer makes the updates, how its learning rate runs, and how its gradients are clipped.

    Schedules are those of transformers (optimization.py): a linear warm-up from 0, then to 0 after the last update.
    """

    later: ClassVar[tuple[str, ...]] = (
        *("optimizer", "momentum", "schedule", "warmup", "clip_norm", "class_percentile", "decayed"),
    )

    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="Optimizer; adamw decouples weight decay from the gradient (Loshchilov and Hutter 2019)."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(0.0, ge=0, le=1e30, description="Weight decay; step sizes have none.")
    decayed: Literal["all", "weights", "matrices"] = Field(
        "all",
        description="Parameters with weight decay: all; weights, without biases; or matrices, without biases and the "
        "weights of normalisation layers.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning-rate schedule: constant, or a decay to 0, linear or by half a cosine."
    )
    warmup: int = Field(
        0, ge=0, le=LARGEST_INT, description="Updates over which all learning rates rise linearly from 0."
    )
    clip_norm: float | None = Field(
        None,
        gt=0,
        le=1e30,
        description="Largest L2 norm of the gradient of all parameters; a larger one is scaled down.",
    )
    class_percentile: float | None = Field(
        None,
        ge=0,
        le=100,
        description="Percentile of the accuracies of a domain's classes, logged for each domain.",
    )

    @property
    def scheduled(self) -> bool:
        """Whether learning rates change from update to update."""
        return self.schedule != "constant" or self.warmup > 0


def rate(spec: Optimizing, step: int, updates: int) -> float:
    """Return the factor on all learning rates in one update.

    Args:
        spec: has the schedule and its warm-up.
        step: of the update, counted from 0.
        updates: number of all updates.
    """
    if step < spec.warmup:
        return step / spec.warmup
    done = (step - spec.warmup) / max(1, updates - spec.warmup)
    match spec.schedule:
        case "linear":
            return 1 - done
        case "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        case _:
            return 1.0
