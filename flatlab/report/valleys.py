"""SWAD's valley as a sentence: its first and last step, or that none began. Torch-free."""

from collections.abc import Iterable, Mapping
from typing import Any

from flatlab.errors import count_of
from flatlab.store.runs import Run

NONE = {  # rule -> what SWAD returns if no valley begins
    "paper": "the mean of all iterates (Algorithm 1)",
    "released": "the mean of only the last segment (as the released code does)",
}


def sentence(valley: Mapping[str, Any], rule: str = "paper") -> str:
    """Return a sentence on where a valley lies, or on what is averaged if none began.

    Args:
        valley: start, end, threshold, dead and span, as `train.swad` notes them.
        rule: "paper" or "released".
    """
    first, last = valley["span"]
    if valley["start"] is None:
        return f"no valley began: {NONE[rule]}, steps {first} to {last}, is returned."
    end = "before the end of training" if valley["dead"] else "at the end of training"
    return (
        f"the valley begins at step {valley['start']} and ends at step {valley['end']}, {end}; the threshold is "
        f"{valley['threshold']:.4f} nats."
    )


def of(run: Run) -> dict[str, Any]:
    """Return the valley in a finished run's log; empty if the run is not SWAD's."""
    found: dict[str, Any] = next((row["valley"] for row in run.rows() if "valley" in row), {})
    return found


def remarks(runs: Iterable[Run]) -> list[str]:
    """Return a sentence on the SWAD runs in which no valley began; none if one began in each.

    Args:
        runs: finished; those of other averages are skipped.
    """
    mine = {run.spec.digest: run for run in runs if run.spec.average.kind == "swad" and not run.spec.members}
    without = [run for run in mine.values() if (found := of(run)) and found["start"] is None]
    if not without:
        return []
    named = "; ".join(f"{run.spec.label}, {run.spec.target}, seed {run.spec.seed}" for run in without)
    returned = "it returns" if len(without) == 1 else "they return"
    over = " and ".join(NONE[rule] for rule in sorted({run.spec.average.rule for run in without}))
    number = f"{len(without)} of {count_of(len(mine), 'run')}"
    return [f"SWAD: no valley began in {number} ({named}); {returned} {over}."]
