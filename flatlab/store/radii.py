"""Radii for given rises, from the pilots on reference runs. Torch-free."""

import numpy as np

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.rises import ByRise
from flatlab.store.runs import RunStore


def by_rise(store: RunStore, radii: ByRise, spec: MeasurementSpec) -> FloatArray:
    """Return a radius for each rise: the geometric mean over the reference runs, rounded to two digits.

    Args:
        store: contains the pilots.
        radii: the rises and reference runs.
        spec: the measurement.

    Raises:
        UserError: if a pilot is missing, or two rises give the same radius.
    """
    found = [store.find(digest).result(pilot).radii for digest, pilot in spec.pilots]
    means = np.exp(np.log(found).mean(axis=0))
    rounded = [float(f"{radius:.1e}") for radius in means.tolist()]
    if len(set(rounded)) < len(rounded):
        raise UserError(
            f"The rises must give radii that differ in two digits, got {radii.rises} nats at radii {rounded}: give "
            "fewer rises."
        )
    return np.array(rounded)
