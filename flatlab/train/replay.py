"""Offline: SWAD's rule replayed on the log of a finished run, as if each evaluation had ended a segment."""

from functools import partial
from typing import Any

from flatlab.runs import Run
from flatlab.selection import candidates
from flatlab.specs import AverageSpec
from flatlab.train.averages import SWAD


def valley(run: Run, spec: AverageSpec | None = None) -> dict[str, Any]:
    """Return where the valley of a run's validation loss begins and ends, and its threshold (Cha et al. 2021).

    Args:
        run: finished; its evaluations from the switch on count.
        spec: N_s, N_e and r; SWAD's own by default. The interval is that of the run's evaluations.

    Returns:
        start, end (steps), threshold (nats) and dead (whether it ended before training did); None where none began.
    """
    rule = SWAD((spec or AverageSpec()).replace(kind="swad", every=1))
    for row in candidates(run.rows(), run.spec.switch):
        rule.update({}, row["step"], partial(float, row["validation_loss"]))
    found = rule.facts()["valley"]
    return {name: found[name] for name in ("start", "end", "threshold", "dead")}
