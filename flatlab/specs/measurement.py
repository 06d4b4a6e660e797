"""What every measurement says of itself, and how its passes are foreseen."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from flatlab.specs.base import Spec

FORESEEN = 20  # images that one radius takes at a relative error of 1, whatever their number; the pilot knows better
PRODUCT = 10  # forward passes that a Hessian-vector product costs
PILOT = 64  # products that a trace takes as a rule, beyond its basis
Sizes = Mapping[str, int]  # images of each domain


class MeasurementSpec(Spec):
    """What every measurement says of itself: which checkpoint, on which images."""

    metric: str
    checkpoint: Literal["selected", "last"] = "selected"
    split: Literal["in", "out"] = "in"
    images: int | None = Field(None, ge=1)  # at most so many per domain; None is all
    space: Literal["baked", "latent"] = "baked"
    params: str | None = None  # a pattern of parameter names; None is all
    seed: int = Field(0, ge=0)

    def count(self, sizes: Sizes) -> int:
        """Return how many images are looked at."""
        return sum(min(size, self.images or size) for size in sizes.values())

    def passes(self, sizes: Sizes) -> float:
        """Return the images that the measurement forwards, for plans and bars; one look at each, where nobody knows.

        Args:
            sizes: images of each domain.
        """
        return float(self.count(sizes))

    @property
    def pilots(self) -> tuple[tuple[str, "MeasurementSpec"], ...]:
        """Measurements of other runs that must be there first, each with its run's digest."""
        return ()
