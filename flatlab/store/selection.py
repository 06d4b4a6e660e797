"""Which checkpoint counts: pure functions from the rows of a log to the chosen row.

A row holds `step`, `validation` (mean accuracy over the source domains' held-back images, each domain weighing the
same), where it was evaluated `target` (accuracies on the held-out domain's two splits, "in" and "out"), and more.
Nothing here touches a model, so another rule needs no second training.
"""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def training_domain(rows: Sequence[Row]) -> Row:
    """Return the first row with the best source validation accuracy (DomainBed's IIDAccuracySelectionMethod)."""
    return max(rows, key=lambda row: row["validation"])


def oracle(rows: Sequence[Row]) -> Row:
    """Return the first row with the best accuracy on the target's "out" split: looks at the target."""
    return max(rows, key=lambda row: row["target"]["out"]["accuracy"])


def target_accuracy(row: Row) -> float:
    """Return the accuracy on the held-out domain's "in" split; NaN where the run does not log that domain."""
    return float(row["target"]["in"]["accuracy"]) if "target" in row else float("nan")


def last(rows: Sequence[Row]) -> Row:
    """Return the last row."""
    return rows[-1]


RULES: dict[str, Callable[[Sequence[Row]], Row]] = {
    "training-domain": training_domain,
    "oracle": oracle,
    "last": last,
}


def candidates(rows: Sequence[Row], settled: int | None) -> list[Row]:
    """Return the rows from the step on at which a run is what its name says: quantized, where it is to be."""
    return [row for row in rows if row["step"] >= (settled or 0)]
