"""Outputs for the numbers of a monitor, in addition to its own table."""

import csv
from collections.abc import Mapping
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from flatlab.errors import UserError


class Sink(Protocol):
    """Any object with this function: a run of Weights & Biases, the module `trackio`, or a user's class."""

    def log(self, values: dict[str, Any], step: int) -> object:
        """Record the numbers of one step, by name."""


class CSV:
    """A file with one row for each measurement; rows are appended, so that a resumed training continues its file.

    Args:
        path: path of the file.

    Raises:
        UserError: by the first `log`, if the file has other columns.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append a row; a new file gets the names of the columns first."""
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
        folder: folder for the event files, as in `tensorboard --logdir FOLDER`.

    Raises:
        UserError: the package is not installed.
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
