"""Selection of a checkpoint: pure functions from the rows of a log to the chosen row.

A row contains `step`, `validation` (accuracy on the validation images of the source domains, averaged over domains),
`target` where it was evaluated (accuracies on the held-out domain's two splits, "in" and "out") and more. No model is
needed, so that another rule needs no second training.
"""

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def training_domain(rows: Sequence[Row]) -> Row:
    """Return the first row with the best source validation accuracy (DomainBed's IIDAccuracySelectionMethod)."""
    return max(rows, key=lambda row: row["validation"])


def oracle(rows: Sequence[Row]) -> Row:
    """Return the first row with the best accuracy on the target's "out" split (uses the target domain)."""
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


def rules(rows: Sequence[Row]) -> dict[str, Callable[[Sequence[Row]], Row]]:
    """Return the rules that a log allows: the oracle needs an "out" split of the target."""
    seen = "out" in rows[0].get("target", {})
    return {name: rule for name, rule in RULES.items() if seen or name != "oracle"}


def candidates(rows: Sequence[Row], settled: int | None) -> list[Row]:
    """Return the rows from the step on at which a run is fully quantized or frozen."""
    return [row for row in rows if row["step"] >= (settled or 0)]
