"""Radii that are chosen by rise: how far around reference runs the loss has risen by so many nats."""

from collections.abc import Collection
from typing import Literal, Self

from pydantic import Field, model_validator

from flatlab.specs.base import Spec
from flatlab.specs.measurement import MeasurementSpec, Sizes

Normalisation = Literal["none", "filter", "layer", "parameter"]
REACHING = 20_000  # images that finding the radii of one run forwards at most (metrics/pilot.py)


def _check(rises: tuple[float, ...]) -> None:
    if not rises or list(rises) != sorted(set(rises)) or rises[0] <= 0:
        raise ValueError(f"The rises must be one or more numbers above 0, each larger than the one before, got {rises}")


class ByRise(Spec):
    """Radii where the loss of reference runs has risen by so many nats on their source domains.

    Of several runs the geometric mean counts, rounded to two digits: the radii are found when they are needed, and
    are no part of a measurement's name.
    """

    rises: tuple[float, ...]  # nats
    references: tuple[str, ...] = Field(min_length=1)  # digests of runs

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _check(self.rises)
        return self


class ReachSpec(MeasurementSpec):
    """The radii at which the loss of a run rises by so many nats on its source domains: a pilot's, without interval."""

    metric: Literal["reach"] = "reach"
    rises: tuple[float, ...]
    normalisation: Normalisation = "none"

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _check(self.rises)
        return self

    def passes(self, sizes: Sizes) -> float:
        """Return the images that are forwarded at most.

        Args:
            sizes: images of each domain.
        """
        return float(min(REACHING, 100 * self.count(sizes)))


Radii = tuple[float, ...] | Literal["auto"] | ByRise


def pilots_of(measurement: MeasurementSpec, radii: object, **fields: object) -> tuple[tuple[str, MeasurementSpec], ...]:
    """Return the measurements of reference runs that radii rest on, each with its run's digest; none of plain numbers.

    Args:
        measurement: the measurement at these radii.
        radii: as it names them.
        fields: of the pilots, where they differ from the measurement's.
    """
    if not isinstance(radii, ByRise):
        return ()
    shared = {name: getattr(measurement, name) for name in MeasurementSpec.model_fields if name != "metric"}
    pilot = ReachSpec.make(**{**shared, **fields}, rises=radii.rises)
    return tuple((digest, pilot) for digest in radii.references)


def count_above_zero(radii: Collection[float] | ByRise) -> int:
    """Return how many radii there are, zero left out: nothing is sampled there."""
    return len(radii.rises) if isinstance(radii, ByRise) else sum(radius > 0 for radius in radii)
