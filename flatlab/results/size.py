"""The size of a network as a file."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class FileSize:
    """The size of a run's network as a file.

    Attributes:
        bytes: of the exported file, its quantized weights packed.
        float_bytes: of all the network's tensors in float32.
    """

    bytes: int
    float_bytes: int

    def to_arrays(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Return the content of a measurement's file."""
        return {"bytes": np.array(self.bytes), "float_bytes": np.array(self.float_bytes)}, {}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]], facts: dict[str, Any]) -> Self:
        """Return the result from what `to_arrays` returns."""
        del facts
        return cls(int(arrays["bytes"]), int(arrays["float_bytes"]))
