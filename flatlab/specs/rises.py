"""Radii chosen by rise: the distances around reference runs at which the loss has risen by given amounts (nats)."""

from collections.abc import Collection
from typing import Literal, Self

from pydantic import Field, model_validator

from flatlab.specs.base import Spec
from flatlab.specs.measurement import MeasurementSpec, Sizes

Normalisation = Literal["none", "filter", "layer", "parameter"]
REACHING = 20_000  # maximum images forwarded to find the radii of one run (metrics/flatness/pilot.py)


def _check(rises: tuple[float, ...]) -> None:
    if not rises or list(rises) != sorted(set(rises)) or rises[0] <= 0:
        raise ValueError(f"The rises must be one or more numbers > 0 in increasing order, got {rises}")


class ByRise(Spec):
    """Radii at which the loss of reference runs has risen by given amounts (nats) on their source domains.

    For several runs the geometric mean is used, rounded to two digits. The radii are computed when needed, and are
    not part of a measurement's digest.
    """

    rises: tuple[float, ...]  # nats
    references: tuple[str, ...] = Field(min_length=1)  # digests of runs

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _check(self.rises)
        return self


class ReachSpec(MeasurementSpec):
    """The radii at which the loss of a run rises by given amounts on its source domains: a pilot, without intervals."""

    metric: Literal["reach"] = "reach"
    rises: tuple[float, ...]
    normalisation: Normalisation = "none"

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        _check(self.rises)
        return self

    def passes(self, sizes: Sizes) -> float:
        """Return the maximum number of images forwarded.

        Args:
            sizes: images of each domain.
        """
        return float(min(REACHING, 100 * self.count(sizes)))


Radii = tuple[float, ...] | Literal["auto"] | ByRise


def pilots_of(measurement: MeasurementSpec, radii: object, **fields: object) -> tuple[tuple[str, MeasurementSpec], ...]:
    """Return the measurements of reference runs that determine radii, each with its run's digest; none for numbers.

    Args:
        measurement: the measurement at these radii.
        radii: the radii of its spec.
        fields: fields of the pilots that differ from the measurement's.
    """
    if not isinstance(radii, ByRise):
        return ()
    shared = {name: getattr(measurement, name) for name in MeasurementSpec.model_fields if name != "metric"}
    pilot = ReachSpec.make(**{**shared, **fields}, rises=radii.rises)
    return tuple((digest, pilot) for digest in radii.references)


def count_above_zero(radii: Collection[float] | ByRise) -> int:
    """Return the number of radii above zero, those at which something is sampled."""
    return len(radii.rises) if isinstance(radii, ByRise) else sum(radius > 0 for radius in radii)
