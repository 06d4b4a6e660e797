"""Disorder of step sizes' gradients and the frozen share, from the logs of GAQAT's and FQAT's runs. Torch-free."""

from collections.abc import Iterable
from typing import Any

import pandas as pd

from flatlab.specs.methods import Labelled
from flatlab.store.runs import RunStore

COLUMNS = ["method", "held_out", "seed", "layer", "step", "measure", "value"]


def along(store: RunStore, wanted: Iterable[Labelled]) -> pd.DataFrame:
    """Return a row for each run, step-size tensor (`layer`), evaluation and measure, as shares of 1.

    Measures: disorder of the gradient of the `task` and of the perturbed loss (`smooth`), disagreement `between` their
    signs, and the `frozen` share; each since the evaluation before. A disorder without a pair of signs is NaN. The
    first evaluation, of a single step, is left out.

    Args:
        store: contains the finished runs.
        wanted: method's name, run.
    """
    rows: list[dict[str, Any]] = []
    for label, spec in wanted:
        named = {"method": label, "held_out": spec.held_out, "seed": spec.seed}
        for row in store.run(spec).rows()[1:]:
            for layer, numbers in row.get("disorder", {}).items():
                for measure, value in numbers.items():
                    share = float("nan") if value is None else value
                    rows.append({**named, "layer": layer, "step": row["step"], "measure": measure, "value": share})
    return pd.DataFrame(rows, columns=COLUMNS)
