"""Radii chosen by rise: the distances around reference runs at which the loss has risen by given amounts (nats)."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from flatlab.specs.base import Spec
from flatlab.specs.measurement import MeasurementSpec, Sizes
from flatlab.specs.quantizers import Bits

Normalisation = Literal["none", "filter", "layer", "parameter"]  # that of arguments.py, which loads numpy
REACHING = 20_000  # maximum images forwarded to find the radii of one run (metrics/flatness/pilot.py)


def _ascending(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if not numbers or list(numbers) != sorted(set(numbers)) or numbers[0] <= 0:
        raise ValueError("must be one or more numbers > 0 in increasing order")
    return numbers


Ascending = Annotated[tuple[float, ...], AfterValidator(_ascending)]


class ByRise(Spec):
    """Radii at which the loss of reference runs has risen by given amounts (nats) on their source domains.

    For several runs the geometric mean is used, rounded to two digits. The radii are computed when needed, and are
    not part of a measurement's digest.
    """

    rises: Ascending  # nats
    references: tuple[str, ...] = Field(min_length=1)  # digests of runs


class ReachSpec(MeasurementSpec):
    """The radii at which the loss of a run rises by given amounts on its source domains: a pilot, without intervals."""

    metric: Literal["reach"] = "reach"
    space: Literal["baked", "latent"] = "baked"
    rises: Ascending
    normalisation: Normalisation = "none"

    def passes(self, sizes: Sizes) -> float:
        """Return the maximum number of images forwarded."""
        return float(min(REACHING, 100 * self.count(sizes)))


class ByNoise(Spec):
    """Radii in units of a run's own quantization noise, the L2 norm of w_q - w over all quantized weights.

    A run that is not quantized has that of rounding to `bits`, with the step sizes that LSQ would begin with.
    """

    multiples: Ascending
    bits: Bits | None = None  # None: the run's own quantizer


Radii = tuple[float, ...] | Literal["auto"] | ByRise | ByNoise


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
    shared |= {"space": "baked"} if measurement.space == "codes" else {}
    pilot = ReachSpec.make(**{**shared, **fields}, rises=radii.rises)
    return tuple((digest, pilot) for digest in radii.references)


def count_above_zero(radii: Collection[float] | ByRise | ByNoise) -> int:
    """Return the number of radii above zero, those at which something is sampled."""
    if isinstance(radii, ByNoise):
        return len(radii.multiples)
    return len(radii.rises) if isinstance(radii, ByRise) else sum(radius > 0 for radius in radii)
