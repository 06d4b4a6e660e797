"""Units of a measurement as files in its directory, which any number of processes can compute together."""

import time
from collections.abc import Callable, Iterator, Sequence

from filelock import FileLock, Timeout

from flatlab import files
from flatlab.arguments import FloatArray
from flatlab.metrics.units import Unit
from flatlab.store.runs import Measurement

IDLE_SECONDS = 0.05  # between the first two checks of units that others compute


class UnitFiles:
    """Units of a measurement as files in its directory, which any number of processes can compute together."""

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement

    def units(self, units: Sequence[Unit]) -> Iterator[FloatArray]:
        """Yield the units' arrays in their order; those that no other process is computing are computed here."""
        for index, (name, _) in enumerate(units):
            path, pauses = self.measurement.unit(name), files.pauses(IDLE_SECONDS)
            while not path.exists():
                free = (each for each in units[index:] if self._fill(*each))
                if next(free, None) is None and not path.exists():
                    time.sleep(next(pauses))  # other processes compute all missing units
            yield files.load_arrays(path)[0]["unit"]

    def _fill(self, name: str, compute: Callable[[], FloatArray]) -> bool:
        """Compute and store a unit if it is missing and no other process computes it; return whether it did."""
        path = self.measurement.unit(name)
        if path.exists():
            return False
        try:
            with FileLock(self.measurement.path / f".{name}.lock", timeout=0):
                if path.exists():
                    return False
                started = time.monotonic()
                files.save_arrays(path, {"unit": compute()})
        except Timeout:
            return False
        spent = time.monotonic() - started
        self.measurement.add_note(lambda known: {"seconds": round(known.get("seconds", 0) + spent, 3)})
        return True
