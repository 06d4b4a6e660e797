"""The sentences on a result: verdict and remarks of its class; without a verdict its numbers."""

from typing import Any

import numpy as np

from flatlab.report import panels
from flatlab.report.surface import barrier_sentence
from flatlab.results.connectivity import Connection, Connections
from flatlab.results.estimate import Sampled


def sentences(found: Any) -> list[str]:
    """Return the verdict of a result, then its remarks; of a line between two checkpoints whether it has a barrier."""
    verdict = [found.verdict()] if hasattr(found, "verdict") else []
    if isinstance(found, Connection):
        verdict = [barrier_sentence(found)]
    if isinstance(found, Connections):
        lines = found.panels.items()
        verdict = [f"{panels.TITLES.get(name, name)}: {barrier_sentence(line)}" for name, line in lines]
    return [*verdict, *getattr(found, "remarks", ())]


def summary(name: str, found: Any) -> list[str]:
    """Return the sentences on a saved result, each with its name; of one without a verdict first its numbers.

    Args:
        name: of the result.
        found: the result.
    """
    judged = hasattr(found, "verdict") or isinstance(found, Connection)
    numbers = [] if judged or not hasattr(found, "interval") else _numbers(found)
    lines = [*numbers, *sentences(found)] or ["no rule gives a verdict; see its section."]
    return [f"{name} ({type(found).__name__}): {sentence}" for sentence in lines]


def _numbers(found: Any) -> list[str]:
    """Return the first and the last value with their intervals, and whether the accuracy asked for is missed."""
    low, value, high = (np.atleast_1d(each) for each in (found.interval()[0], found.value, found.interval()[1]))
    axis, places = found.axis if isinstance(found, Sampled) else ("index", np.arange(len(value)))
    parts = [
        _bracketed(value[row], low[row], high[row]) + (f" at {axis} {places[row]:g}" if len(value) > 1 else "")
        for row in dict.fromkeys((0, len(value) - 1))
    ]
    over = f" (95 % over {found.over})" if isinstance(found, Sampled) else ""
    missed = [] if getattr(found, "converged", True) else ["the accuracy that was asked for is not reached."]
    return [f"its value is {' and '.join(parts)}{over}.", *missed]


def _bracketed(value: float, low: float, high: float) -> str:
    known = np.isfinite([low, high]).all()
    return f"{value:.4g} [{low:.4g}, {high:.4g}]" if known else f"{value:.4g} (no interval)"
