"""Numbers of the accuracy along a training: its variation, its agreement with validation, the regret of selection."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from flatlab.errors import UserError
from flatlab.saving import Saved

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Stability(Saved):
    """Numbers of one training; accuracies are shares of 1.

    Attributes:
        spread: standard deviation of the accuracy on the held-out domain over the evaluations, with n - 1.
        change: mean absolute difference between consecutive evaluations.
        correlation: Spearman's, between validation and held-out accuracy; NaN if one is constant, or for two points.
        regret: the best held-out accuracy less that at the best validation (the first of equals).
        points: number of evaluations.
    """

    spread: float
    change: float
    correlation: float
    regret: float
    points: int

    def to_frame(self) -> "pd.DataFrame":
        """Return a table of one row: the numbers."""
        import pandas as pd

        return pd.DataFrame([asdict(self)])


def stability(validation: npt.ArrayLike, target: npt.ArrayLike) -> Stability:
    """Return the numbers of one training.

    Args:
        validation: accuracy (n,) on the source domains, at each evaluation, in the order of the steps.
        target: accuracy (n,) on the held-out domain, at the same.

    Raises:
        UserError: if they are not of one length, or fewer than two.
    """
    from scipy.stats import spearmanr  # here: it takes half a second to load

    inside, outside = np.asarray(validation, dtype=float), np.asarray(target, dtype=float)
    if inside.shape != outside.shape or inside.ndim != 1 or len(inside) < 2:
        raise UserError(
            f"Stability needs two series of at least two evaluations each, got shapes {inside.shape} and "
            f"{outside.shape}: give a smaller --eval-every, or an earlier --since."
        )
    moving = len(inside) > 2 and np.ptp(inside) > 0 and np.ptp(outside) > 0  # for two points it is always 1 or -1
    return Stability(
        spread=float(outside.std(ddof=1)),
        change=float(np.abs(np.diff(outside)).mean()),
        correlation=float(spearmanr(inside, outside).statistic) if moving else float("nan"),
        regret=float(outside.max() - outside[inside.argmax()]),
        points=len(inside),
    )
