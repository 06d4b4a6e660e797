"""Rows of single runs: their flatness, and as a file with a column for each measure, to be read beside another store's.

Each row says how it was made: `made`, the fields of the run's spec that are not at their defaults, those of the
measurement of flatness, and the digests of the run and of all measurements, as "name value; name value"; and `data`,
the fingerprint of the images. Both are compared with what a command would make of the same method. Torch-free.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analyses.fig3 import SYMBOLS
from flatlab.errors import UserError, choose
from flatlab.report import verdicts
from flatlab.report.areas import WHERE, areas_by_domain, limits
from flatlab.report.panels import SOURCE, TARGET
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.methods import Labelled
from flatlab.specs.run import RunSpec
from flatlab.store.runs import RunStore

KEYS = ["measure", "method", "held_out", "seed"]
RUN = ["dataset", "method", "held_out", "seed"]
MADE = ["made", "data"]
DIGESTS = {"run", "measurements", "radii.references"}  # in `made`
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


def reach(frame: pd.DataFrame, baseline: str) -> list[str]:
    """Return a sentence on the radii up to which F is averaged; none if they are not known."""
    each = frame[frame["over"] == "run"].groupby("measure", sort=False)["value"].first()
    ends: dict[str, list[str]] = {}
    for name, limit in each[each.index.str.startswith(LIMIT)].items():
        panel, kind = str(name).removeprefix(LIMIT).split(", ")
        radii = each[each.index.str.startswith(RADIUS) & each.index.str.endswith(f", {kind}")]
        rise = str((radii - limit).abs().idxmin()).removeprefix(RADIUS).removesuffix(f", {kind}")
        ends.setdefault(f"{SYMBOLS[kind]} = {limit:g} ({baseline}'s rise: {rise})", []).append(panel)
    where = {end: f" on {panels[0]} domains" if len(panels) == 1 else "" for end, panels in ends.items()}
    shown = ", ".join(end + on for end, on in where.items())
    return [f"F is averaged up to {shown}."] if ends else []


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
    table = each.pivot(index=[*RUN, *MADE], columns="measure", values="value")
    return table[each["measure"].unique()].reset_index().rename_axis(columns=None)


def made(run: RunSpec, measured: Sequence[MeasurementSpec]) -> str:
    """Return how a row is made, as text: data set, held-out domain and seed have columns of their own.

    Args:
        run: its spec.
        measured: the measurements of the page; the fields of the first are named, of the others the digests alone.
    """
    fields = {name: value for name, value in run.texts(exclude_defaults=True).items() if name not in RUN}
    fields |= measured[0].texts(exclude_defaults=True) if measured else {}
    fields |= {"run": run.digest, "measurements": "+".join(each.digest for each in measured)}
    return "; ".join(f"{name} {value}" for name, value in fields.items())


def origins(store: RunStore, runs: list[Labelled], measured: Sequence[MeasurementSpec]) -> pd.DataFrame:
    """Return a row for each run: how it was made, and of which data.

    Args:
        store: contains the runs.
        runs: each with its method's name.
        measured: the measurements of the page.
    """
    data = [store.run(run).provenance.get("data_fingerprint", "unknown") for _, run in runs]
    rows = [
        (name, run.held_out, run.seed, made(run, measured), each) for (name, run), each in zip(runs, data, strict=True)
    ]
    return pd.DataFrame(rows, columns=[*KEYS[1:], *MADE])


def read(
    path: Path,
    wanted: list[Labelled],
    measured: Sequence[MeasurementSpec],
    *,
    known: Sequence[str],
    percent: Sequence[str],
) -> pd.DataFrame:
    """Return the rows of some runs in the form of a table: a row for each run and measure.

    Args:
        path: a csv of `wide`.
        wanted: the runs, each with its method's name; methods that the file lacks are left out.
        measured: the measurements of the page.
        known: the methods that the file may have.
        percent: measures that are from 0 to 100.

    Raises:
        UserError: if it is no such file; if it lacks runs of a method, has runs that were made in another way, or
            numbers that cannot be those of runs.
    """
    found = _table(path)
    for name in found["method"].unique():
        choose(f"method in {path}", name, known)
    asked = pd.DataFrame(
        [(name, run.held_out, run.seed, run.dataset, made(run, measured)) for name, run in wanted],
        columns=["method", "held_out", "seed", "dataset", "asked"],
    )
    asked = asked[asked["method"].isin(set(found["method"]))]
    sizes = found.groupby(RUN).size().to_dict()
    for _, row in asked.iterrows():
        if (count := sizes.get(tuple(row[RUN]), 0)) != 1:
            raise UserError(f"{path} must have one row for {_named(row)}, got {count}.")
    mine = asked.merge(found, on=RUN)
    for _, row in mine[mine["made"] != mine["asked"]].iterrows():
        theirs, ours = _differences(row["made"], row["asked"])
        raise UserError(
            f"--rows must have runs as this command would make them, with {ours}, got {theirs} for {_named(row)} in "
            f"{path}."
        )
    found = mine.drop(columns="asked").melt([*RUN, *MADE], var_name="measure")
    found = found.dropna(subset=["value"])
    same_radii(found, f" in {path}")
    _check(path, mine, percent)
    return found


def _table(path: Path) -> pd.DataFrame:
    """Return the content of a file with rows of single runs."""
    must = "--rows must be a csv with a row for each run (runs.csv), got"
    try:
        found = pd.read_csv(path, dtype=dict.fromkeys([*RUN[:3], *MADE], str)).copy()  # in one piece
    except (OSError, ValueError) as error:
        raise UserError(f"{must} {path}: {error}") from None
    lacking = [name for name in (*RUN, *MADE) if name not in found]
    lacking += [f"{start}..." for start in (RADIUS, LIMIT, "F at ") if not any(found.columns.str.startswith(start))]
    if lacking:
        raise UserError(f"{must} {path}, which has no column {lacking[0]}.")
    for name in found.drop(columns=[*RUN[:3], *MADE]).select_dtypes(exclude="number"):
        raise UserError(f"{must} {path}, which has text in the column {name!r}.")
    return found


def _named(row: "pd.Series[Any]") -> str:
    return f"{row['method']} on {row['held_out']} ({row['dataset']}), seed {row['seed']}"


def _differences(*words: str) -> list[str]:
    """Return of each text of `made` what the other does not have; digests only if nothing else differs."""
    fields = [dict(part.partition(" ")[::2] for part in str(text).split("; ")) for text in words]
    unlike = [name for name in {**fields[0], **fields[1]} if fields[0].get(name) != fields[1].get(name)]
    shown = [name for name in unlike if name not in DIGESTS] or unlike
    return [", ".join(f"{name} {each.get(name, '(default)')}" for name in shown) for each in fields]


def _check(path: Path, rows: pd.DataFrame, percent: Sequence[str]) -> None:
    """Refuse numbers that cannot be those of runs.

    Args:
        path: of the file, for messages.
        rows: as `wide` returns them.
        percent: measures that are from 0 to 100.
    """
    for name in [each for each in percent if each in rows]:
        for _, row in rows[(rows[name] < 0) | (rows[name] > 100)].iterrows():
            raise UserError(f"{path}: {name} must be from 0 to 100, got {row[name]:g} for {_named(row)}.")
    for measure in rows.columns[rows.columns.str.startswith(LIMIT)].str.removeprefix(LIMIT):
        for _, row in rows[rows[measure].notna()].iterrows() if measure in rows else ():
            found, mean = float(row[measure]), _mean_of(row, measure)
            if not np.isclose(found, mean, rtol=1e-6):
                raise UserError(
                    f"{path}: the mean of F, {measure}, must be that of F at its radii, {mean:.6g}, got {found:.6g} "
                    f"for {_named(row)}."
                )


def _mean_of(row: "pd.Series[Any]", measure: str) -> float:
    """Return the mean of F over the radii from 0 to the limit, from the columns of a row."""
    kind = measure.rpartition(", ")[2]
    names = [name for name in map(str, row.index) if name.startswith(RADIUS) and name.endswith(f", {kind}")]
    at = [f"F at {name.removeprefix(RADIUS).removesuffix(kind)}{measure}" for name in names]
    curve = pd.DataFrame({"radius": row[names].to_numpy(float), "value": row.reindex(at).to_numpy(float)})
    limit = row[LIMIT + measure]
    inside = curve[curve["radius"] <= limit * (1 + 1e-9)].sort_values("radius")
    return float(np.trapezoid([0.0, *inside["value"]], [0.0, *inside["radius"]]) / limit)


def same_radii(rows: pd.DataFrame, why: str = "") -> None:
    """Refuse runs whose radii, or the last of these, differ by more than 5 %: their flatness is not comparable.

    Args:
        rows: of runs, of one store or of several.
        why: a sentence on the reason, for the message.

    Raises:
        UserError: names the first radius that differs.
    """
    for measure, mine in rows[rows["measure"].str.startswith((RADIUS, LIMIT))].groupby("measure", sort=False):
        ordered = mine.sort_values("value")
        low, high = ordered.iloc[0], ordered.iloc[-1]
        if not high["value"] <= low["value"] * (1 + APART):
            raise UserError(
                f"The {measure} must be the same for all runs within {APART:.0%}, got {low['value']:.4g} for "
                f"{low['method']} on {low['held_out']} and {high['value']:.4g} for {high['method']} on "
                f"{high['held_out']}{why}."
            )


def same_data(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Refuse rows of other images than those of the store.

    Raises:
        UserError: names both fingerprints.
    """
    for other in set(theirs["data"]) - set(ours["data"]):
        own = ", ".join(sorted(set(ours["data"])))
        raise UserError(f"--rows must be of the data of this store, whose fingerprint is {own}, got {other}.")


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
