"""Resumable pieces of work: units that can be computed in any order, stored, or computed by another process."""

from collections.abc import Callable, Iterator, Sequence

from flatlab.arguments import FloatArray

Unit = tuple[str, Callable[[], FloatArray]]
Keep = Callable[[Sequence[Unit]], Iterator[FloatArray]]


def forget(units: Sequence[Unit]) -> Iterator[FloatArray]:
    """Compute units one after the other, and store nothing."""
    return (compute() for _, compute in units)
