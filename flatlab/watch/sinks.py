"""Where the numbers of a monitor go, besides its own table."""

import csv
from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from flatlab.errors import UserError


class Sink(Protocol):
    """Anything with such a function: a run of Weights & Biases, the module `trackio`, a class of one's own."""

    def log(self, values: dict[str, Any], step: int) -> object:
        """Take the numbers of one step, by name."""


class CSV:
    """A file with one row for each measurement; rows are appended, so that a resumed training goes on with its file.

    Args:
        path: of the file.

    Raises:
        UserError: on the first row, if the file has other columns.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append a row, below the names where the file is new."""
        names = ["step", *values]
        with self.path.open("a+", newline="") as file:
            file.seek(0)
            known = next(csv.reader(file), [])
            if known and known != names:
                raise UserError(
                    f"{self.path} has the columns {', '.join(known)}, got {', '.join(names)}; give another file, "
                    "or the same `numbers` as before."
                )
            rows = csv.writer(file)
            if not known:
                rows.writerow(names)
            rows.writerow([step, *values.values()])


class TensorBoard:
    """Scalars for TensorBoard (extra `tensorboard`), under `flatness/`.

    Args:
        folder: as `tensorboard --logdir` takes it.

    Raises:
        UserError: where the package is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        if find_spec("tensorboard") is None:
            raise UserError("TensorBoard needs a package that is not installed: pip install 'flatlab[tensorboard]'.")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Write the numbers of one step."""
        for name, value in values.items():
            self.writer.add_scalar(f"flatness/{name}", float(value), step)
        self.writer.flush()
