"""Agreement of the order of our lines with the paper's: differences of all pairs, and Kendall's tau, over seeds.

Functions on the frame of an accuracy table: rows with `dataset`, `panel`, `split`, `method`, `held_out`, `seed`,
`value`, `over`, `published`. Torch-free.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analyses._percent import BY, Panel
from flatlab.report import tables, verdicts
from flatlab.report.panels import ACCURACY


def pairs(frame: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Return the differences of all pairs of lines, paired by held-out domain and seed; the paper's if comparable.

    The verdict is Holm's within a family: in each panel the pairs with the first line, and the others. `agrees` states
    whether the order is the paper's: "yes", "no", or "not distinguishable"; empty if nothing is comparable, or the
    paper's difference is 0. If two lines have different seeds, as ensembles have, the means over all seeds are
    compared, without an interval.

    Args:
        frame: rows of single runs (`over` is "run") and of lines over seeds ("seeds").
        order: the lines; a difference is that of the later one less the earlier one.
    """
    each = frame[frame["over"] == "run"]
    printed = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")].set_index([*BY, "method"])
    found = pd.concat([_pair(each, *pair) for pair in itertools.combinations(order, 2)], ignore_index=True)
    where = found["dataset"] + ", " + pd.Series([*map(ACCURACY.get, zip(found["panel"], found["split"], strict=True))])
    family = where + np.where(found["baseline"] == order[0], f", less {order[0]}", ", other pairs")
    known = found["p"].notna()
    read = known | ~known.groupby(family).transform("any")  # an ensemble has no p-value, and counts in no family
    return _agreement(verdicts.corrected(found, family, read=read), printed)


def _pair(each: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Return the second line less the first: by seed, or of means over all seeds if their seeds differ."""
    both = each[each["method"].isin((first, second))]
    one, other = (set(both[both["method"] == method]["seed"]) for method in (first, second))
    if one != other:
        both = both.groupby(["method", *BY, "held_out"], sort=False)["value"].mean().reset_index().assign(seed="all")
    return tables.paired(both, first, BY)


def _agreement(pairs: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """Add the paper's differences, and whether the order agrees."""
    mine, base = (
        printed.reindex(pd.MultiIndex.from_frame(pairs[[*BY, which]], names=[*BY, "method"]))
        for which in ("method", "baseline")
    )
    theirs = mine["published"].to_numpy() - base["published"].to_numpy()
    spread = np.hypot(mine["published_stderr"].to_numpy(), base["published_stderr"].to_numpy())
    ours = pairs["verdict"].map({"lower": -1, "higher": 1}).fillna(0).to_numpy()
    agrees = np.select(
        [np.isnan(theirs) | (theirs == 0), ours == 0, ours == np.sign(theirs)], ["", "not distinguishable", "yes"], "no"
    )
    return pairs.assign(published=theirs, published_stderr=spread, agrees=agrees)


def sentence(frame: pd.DataFrame, found: pd.DataFrame, dataset: str, panel: Panel) -> str:
    """Return a sentence on the agreement with the paper's order; empty if nothing is comparable.

    Args:
        frame: as for `pairs`.
        found: as `pairs` returns it.
        dataset: of the panel.
        panel: and split.
    """
    mine = _at(found, dataset, panel).query("agrees != ''")
    if mine.empty:
        return ""
    same, other = (mine[mine["agrees"] == answer] for answer in ("yes", "no"))
    return (
        f"{dataset}, {ACCURACY[panel]}: of {len(mine)} pairs of lines {_named(same)} lie distinguishably in the "
        f"order of the paper, {_named(other)} in the opposite one, and {len(mine) - len(same) - len(other)} are not "
        f"distinguishable (p < {verdicts.LEVEL} after Holm's correction). "
        f"Kendall's tau with the printed order: {_bounds(kendall(frame, dataset, panel))}."
    )


def _at(frame: pd.DataFrame, dataset: str, panel: Panel) -> pd.DataFrame:
    return frame[(frame[BY] == [dataset, *panel]).all(axis=1)]


def _named(found: pd.DataFrame) -> str:
    """Return the number of these pairs, and their names."""
    signs = found["value"].map(lambda value: "<" if value < 0 else ">")
    names = [f"{a} {sign} {b}" for a, sign, b in zip(found["method"], signs, found["baseline"], strict=True)]
    return f"{len(names)} ({'; '.join(names)})" if names else "0"


def kendall(frame: pd.DataFrame, dataset: str, panel: Panel) -> Mapping[str, float]:
    """Return Kendall's tau-b of our lines' accuracies with the printed ones: mean and interval over seeds."""
    here = _at(frame, dataset, panel)
    whole = here[(here["over"] == "seeds") & (here["held_out"] == "all")]
    printed = whole.set_index("method")["published"].dropna()
    cells = here[(here["over"] == "run") & here["method"].isin(printed.index)]
    means = cells.groupby(["seed", "method"])["value"].mean().unstack("seed").loc[printed.index].dropna(axis=1)
    found = tables.estimate(np.array([stats.kendalltau(means[seed], printed).statistic for seed in means]))
    return {**found, **{side: float(np.clip(found[side], -1, 1)) for side in ("low", "high")}}  # as tau itself


def _bounds(found: Mapping[str, float]) -> str:
    if not np.isfinite([found["low"], found["high"]]).all():
        return f"{found['value']:+.2f} (no interval)"
    return f"{found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}] over seeds"
