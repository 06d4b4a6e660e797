"""A run's log as TensorBoard events; the package is an extra, and torch is not needed."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flatlab.errors import UserError
from flatlab.store.runs import Run


def needed() -> None:
    """Refuse if TensorBoard is not installed; the error names the extra."""
    if find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package that is not installed: pip install 'flatlab[tensorboard]'.")


def write(run: Run, folder: Path) -> Path:
    """Write the scalars of a run's log to the run's own folder below another, replacing earlier ones; return it.

    Args:
        run: trained, at least in part.
        folder: for `tensorboard --logdir`.
    """
    needed()
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    spec = run.spec
    target = spec.target.replace(" ", "-").replace(":", "-")  # and its corruption
    own = folder / f"{spec.label}-{target}-seed{spec.seed}-{spec.digest[:6]}"
    own.mkdir(parents=True, exist_ok=True)
    for former in own.glob("events.out.tfevents.*"):
        former.unlink()
    writer = EventFileWriter(str(own))
    for row in run.rows():
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row)]
        writer.add_event(Event(step=row["step"], summary=Summary(value=values)))
    writer.close()
    return own


def scalars(row: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a log's row with their names, such as `source/rot0/accuracy`."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{above}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield f"{above}{name}", float(value)
