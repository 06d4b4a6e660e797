"""Kendall's tau-b between the columns of a table of networks, with bootstrap intervals over groups of them. Torch-free.

tau-b is (concordant - discordant pairs) / sqrt(pairs untied in x * pairs untied in y). "equal" counts only pairs of
networks of one stratum, so that differences between strata do not contribute to a correlation.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import scipy  # its parts load when they are used: `stats` takes half a second

from flatlab.arguments import FloatArray

DRAWS = 1000
FEWEST = 10  # minimum number of groups for a bootstrap interval
LEVEL = 0.95
ALL, EQUAL = "all pairs", "equal bits"


def taus(frame: pd.DataFrame, pairs: Iterable[tuple[str, str]], *, stratum: str, group: str) -> pd.DataFrame:
    """Return tau-b of pairs of columns: over all pairs of rows, over pairs of one stratum, and within each stratum.

    `low` and `high` are percentiles of the bootstrap, which draws groups of rows with replacement; `p` is two-sided for
    tau = 0, of the normal distribution with the bootstrap's standard error. Fewer than ten groups give neither. `p_bh`
    is corrected by Benjamini and Hochberg over the rows that share `among`.

    Args:
        frame: a row for each network.
        pairs: names of two columns each.
        stratum: the column of the strata.
        group: the column of the groups.

    Returns:
        Rows with `measure`, `gap`, `among`, `networks`, `value`, `low`, `high`, `p`, `p_bh`; NaN if a column does not
        vary.
    """
    wanted, rows = list(pairs), []
    strata = frame[stratum].to_numpy()
    parts: list[tuple[str, pd.DataFrame, FloatArray | None]] = [
        (ALL, frame, None),
        (EQUAL, frame, (strata[:, None] == strata).astype(float)),
    ]
    parts += [(str(name), mine, None) for name, mine in frame.groupby(stratum, sort=False)]
    for among, mine, mask in parts:
        counts = _drawn(mine[group].to_numpy())
        for names, found in _each(mine, wanted, mask, counts):
            rows.append({"measure": names[0], "gap": names[1], "among": among, "networks": len(mine), **found})
    table = pd.DataFrame(rows)
    return table.assign(p_bh=table.groupby("among", sort=False)["p"].transform(_benjamini_hochberg))


def _drawn(groups: np.ndarray) -> FloatArray:
    """Return how often each row is drawn (1 + DRAWS, n); the first is the table itself."""
    names, index = np.unique(groups, return_inverse=True)
    draws = DRAWS if len(names) >= FEWEST else 0
    drawn = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return np.concatenate([np.ones((1, len(groups))), drawn[:, index]]).astype(float)


def _each(
    frame: pd.DataFrame, pairs: list[tuple[str, str]], mask: FloatArray | None, counts: FloatArray
) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    """Yield each pair with tau, its interval and its p-value."""
    signs = {name: _signs(frame[name].to_numpy(float), mask) for name in {name for pair in pairs for name in pair}}
    untied = {name: _weighed(np.abs(each), counts) for name, each in signs.items()}
    for x, y in pairs:
        with np.errstate(invalid="ignore", divide="ignore"):
            tau = _weighed(signs[x] * signs[y], counts) / np.sqrt(untied[x] * untied[y])
        yield (x, y), _estimate(float(tau[0]), tau[1:][np.isfinite(tau[1:])])


def _signs(values: FloatArray, mask: FloatArray | None) -> FloatArray:
    """Return the signs of all differences (n, n), 0 outside of the mask."""
    ranks = scipy.stats.rankdata(values)  # infinite ones, too
    signs = np.sign(ranks[:, None] - ranks)
    return signs if mask is None else signs * mask


def _weighed(table: FloatArray, counts: FloatArray) -> FloatArray:
    """Return the sum of a table (n, n) over pairs of rows, as often as each is drawn (D,)."""
    return np.asarray(((counts @ table) * counts).sum(1))


def _estimate(tau: float, drawn: FloatArray) -> dict[str, float]:
    if not np.isfinite(tau) or len(drawn) < DRAWS / 2 or not drawn.std() > 0:
        return {"value": tau, "low": float("nan"), "high": float("nan"), "p": float("nan")}
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = 2 * float(scipy.stats.norm.sf(abs(tau) / drawn.std(ddof=1)))
    return {"value": tau, "low": float(low), "high": float(high), "p": p}


def _benjamini_hochberg(p_values: "pd.Series[float]") -> "pd.Series[float]":
    known = p_values.dropna()
    if known.empty:
        return p_values
    return pd.Series(scipy.stats.false_discovery_control(known), known.index).reindex(p_values.index)
