"""How restless a run is after the switch: pure functions of the rows of its log, torch-free.

"Stable" (QT-DoG, Figure 4) is given no number there; these are two.
"""

from collections.abc import Sequence

import numpy as np

from flatlab.selection import Row


def unrest(rows: Sequence[Row], since: int) -> dict[str, float]:
    """Return how much the accuracy out of domain moves from a step on.

    Args:
        rows: of a log; the trained network's own, not an average's.
        since: the first step that counts.

    Returns:
        "std", the standard deviation of the accuracy over evaluations, and "change", the mean absolute difference
        between one evaluation and the next, both as shares of 1; nan where there are fewer than two evaluations.
    """
    accuracy = np.array([row["target"]["in"]["accuracy"] for row in rows if row["step"] >= since])
    if len(accuracy) < 2:
        return {"std": float("nan"), "change": float("nan")}
    return {"std": float(accuracy.std(ddof=1)), "change": float(np.abs(np.diff(accuracy)).mean())}
