"""Rows of single runs: their flatness, and as a file with a column for each measure, to be read beside another store's.

Torch-free.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from flatlab.errors import UserError
from flatlab.report import verdicts
from flatlab.report.areas import WHERE, areas_by_domain, limits
from flatlab.report.panels import SOURCE, TARGET

KEYS = ["measure", "method", "held_out", "seed"]
RUN = ["dataset", "method", "held_out", "seed"]
APART = 0.05  # relative difference of radii above which flatness is not compared
RADIUS, LIMIT = "radius at ", "limit, "  # beginnings of measures that are the same for all runs


def points(curves: pd.DataFrame) -> pd.DataFrame:
    """Return what the means of F are made from: the loss at each run, each radius, and F there with its error."""
    away = curves[curves["radius"] > 0]
    home = curves["panel"] + ", " + curves["normalisation"]
    where, at = home.loc[away.index], " at " + away["rise"].map("{:g} nats".format) + ", "
    parts = [
        curves.assign(measure="loss, " + curves["panel"], value=curves["base_loss"]),
        away.assign(measure=RADIUS + at.str.removeprefix(" at ") + away["normalisation"], value=away["radius"]),
        away.assign(measure="F" + at + where),
        away.assign(measure="standard error of F" + at + where, value=away["stderr"]),
    ]
    return pd.concat(parts, ignore_index=True)[[*KEYS, "value"]].drop_duplicates(KEYS)


def flatness(curves: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of F of each run up to the same radii, and these; not if a method's loss reaches chance before.

    Args:
        curves: rows of runs.
        ends: up to where flatness is read, as `limits` returns it.
    """
    means = areas_by_domain(curves, ends)
    early = set()
    for method, rows in curves.groupby("method", sort=False):
        own = limits(rows).merge(ends, on=WHERE, suffixes=("", "_wanted"))
        early |= {
            (method, *where) for where in own[~(own["limit"] >= own["limit_wanted"])][WHERE].itertuples(index=False)
        }
    panel = means["panel"].where(means["panel"] == TARGET, SOURCE)
    compared = [each not in early for each in zip(means["method"], panel, means["normalisation"], strict=True)]
    found = means[compared].assign(measure=means["panel"] + ", " + means["normalisation"])
    runs = curves[["method", "held_out", "seed"]].drop_duplicates().merge(ends, how="cross")
    read = runs.assign(measure=LIMIT + runs["panel"] + ", " + runs["normalisation"], value=runs["limit"])
    return pd.concat([found, read], ignore_index=True)


def means(frame: pd.DataFrame, titles: Mapping[str, str]) -> pd.DataFrame:
    """Return mean ± standard error over seeds: a line for each method over all held-out domains and for each of them.

    Args:
        frame: the table of the study.
        titles: of the measures, in the order of the columns.
    """
    each = frame[(frame["over"] == "run") & frame["measure"].isin(titles)]
    by_target = each.groupby(["measure", "method", "held_out"], sort=False)["value"]
    apart = by_target.agg(value="mean", stderr="sem").reset_index()
    whole = frame[(frame["over"] == "seeds") & frame["measure"].isin(titles)]
    found = pd.concat([whole, apart], ignore_index=True)
    digits = verdicts.digits_of(titles[measure] for measure in found["measure"])
    cells = [
        f"{value:.{d}f}" + (f" ± {error:.{d}f}" if np.isfinite(error) else "")
        for value, error, d in zip(found["value"], found["stderr"], digits, strict=True)
    ]
    named = found.assign(cell=cells, measure=found["measure"].map(titles))
    table = named.pivot_table(
        index=["held_out", "method"], columns="measure", values="cell", aggfunc="first", sort=False
    )
    return table[[title for title in titles.values() if title in table]].fillna("").reset_index()


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run and a column for each measure, in the order of the frame.

    Args:
        frame: as a table of the study; rows over seeds or over runs are left out.
    """
    each = frame[(frame["held_out"] != "all") & (frame["method"] != "all")]
    table = each.pivot(index=RUN, columns="measure", values="value")
    return table[each["measure"].unique()].reset_index().rename_axis(columns=None)


def read(path: Path, *, dataset: str, methods: list[str], held_out: list[str], seeds: list[int]) -> pd.DataFrame:
    """Return the rows of some methods in the form of a table: a row for each run and measure.

    Args:
        path: a csv of `wide`.
        dataset: of all its rows.
        methods: those to read; those that the file lacks are left out.
        held_out: domains, each with all seeds.
        seeds: of the runs.

    Raises:
        UserError: if it is no such file, of another data set, or lacks runs of a method.
    """
    try:
        found = pd.read_csv(path, dtype=dict.fromkeys(RUN[:3], str))
    except (OSError, ValueError) as error:
        raise UserError(f"--rows must be a csv with a row for each run (runs.csv), got {path}: {error}") from None
    if not set(RUN) <= set(found) or set(found["dataset"]) != {dataset}:
        raise UserError(f"--rows must be a csv with a row for each run of {dataset} (runs.csv), got {path}.")
    mine = found[found["method"].isin(methods) & found["held_out"].isin(held_out) & found["seed"].isin(seeds)]
    for method, own in mine.groupby("method", sort=False):
        if len(own) != len(held_out) * len(seeds) or own.duplicated(RUN).any():
            raise UserError(
                f"{path} must have {method} once for each of {len(held_out)} held-out domains and {len(seeds)} seeds, "
                f"got {len(own)} rows."
            )
    return mine.melt(RUN, var_name="measure").dropna(subset=["value"])[[*KEYS, "value"]]


def same_radii(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Refuse rows whose radii are not those of others: their flatness is not comparable.

    Raises:
        UserError: names the first radius that differs.
    """
    own, other = (_common(rows, RADIUS) for rows in (ours, theirs))
    for measure in own.index.intersection(other.index):
        if not np.isclose(own[measure], other[measure], rtol=APART):
            raise UserError(
                f"The {measure} must be that of --rows, {other[measure]:.4g}, got {own[measure]:.4g}: the baseline's "
                "first seed was trained again, and is another network."
            )


def limits_of(rows: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Return up to where the flatness of rows was read, as the nearest radius of curves: as `limits`, without the rest.

    Args:
        rows: with the limits of another store.
        curves: rows of runs, with radii that are the same but for rounding (`same_radii`).
    """
    found, known = [], curves.groupby("normalisation")["radius"].unique()
    for name, limit in _common(rows, LIMIT).items():
        panel, normalisation = str(name).removeprefix(LIMIT).split(", ")
        radii = known[normalisation]
        found.append({"panel": panel, "normalisation": normalisation, "limit": radii[np.argmin(abs(radii - limit))]})
    return pd.DataFrame(found)


def _common(rows: pd.DataFrame, beginning: str) -> pd.Series:
    mine = rows[rows["measure"].str.startswith(beginning)]
    return mine.groupby("measure", sort=False)["value"].mean()
