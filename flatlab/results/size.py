"""The size of a network as a file."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from flatlab.results.estimate import axes_of
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class FileSize(Saved):
    """The size of a run's network as a file.

    Attributes:
        bytes: of the exported file, its quantized weights packed.
        float_bytes: of all the network's tensors in float32.
    """

    bytes: int
    float_bytes: int

    @property
    def compression(self) -> float:
        """The actual compression: bytes in float32 over bytes of the file."""
        return self.float_bytes / self.bytes

    def to_frame(self) -> "pd.DataFrame":
        """Return one row: the bytes of the file, of float32, and their ratio."""
        import pandas as pd

        return pd.DataFrame([{**asdict(self), "compression": self.compression}])

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the bytes of the file beside those of float32 as bars."""
        axes = axes_of(ax)
        axes.bar(["file", "float32"], [self.bytes, self.float_bytes])
        axes.set_ylabel("bytes")
        return axes

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file."""
        return {"bytes": np.array(self.bytes), "float_bytes": np.array(self.float_bytes)}, {}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns."""
        del facts
        return cls(int(arrays["bytes"]), int(arrays["float_bytes"]))
