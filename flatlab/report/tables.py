"""From the store to tidy frames, and functions on them: DataFrame in, DataFrame out, without state.

One observation is one row. `over` names the source of an interval: "directions" (this checkpoint, these images) or
"seeds" (the method). Torch-free.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.report import verdicts
from flatlab.report.panels import ACCURACY, SOURCE, TARGET, part_of
from flatlab.results.estimate import Estimate, mean_of
from flatlab.results.sphere import SphereFlatness
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import Labelled
from flatlab.specs.rises import ByRise
from flatlab.specs.run import RunSpec
from flatlab.store import selection
from flatlab.store.entry import complaints
from flatlab.store.runs import Run, RunStore

LEVEL = 0.95
ROUNDING = 1e-12  # of values that are equal


def flatness(store: RunStore, wanted: Iterable[tuple[str, RunSpec, SphereSpec]]) -> pd.DataFrame:
    """Return one row per run, panel and radius: the rise of the loss in nats, averaged over directions.

    The panel "source" is the mean over the source domains, with equal weights; "target" is the held-out domain.
    `rise` is the rise for which a radius was chosen (NaN if it was given), `base_loss` the loss at the checkpoint,
    `chance` that of guessing, ln C; all in nats. `each_domain` lists the panel's domains with the rise of each along
    the same directions, `highest` is the largest of these, `ratio` that over their mean (NaN if that is not above 0).

    Args:
        store: contains the finished measurements.
        wanted: method's name, run, measurement.

    Raises:
        UserError: if radii differ between runs that share them, since a reference run was measured again in between.
    """
    found: dict[SphereSpec, tuple[str, FloatArray]] = {}
    rows: list[dict[str, Any]] = []
    for label, run, measurement in wanted:
        flat: SphereFlatness = store.run(run).result(measurement, label)
        first, radii = found.setdefault(measurement, (run.digest, flat.radii))
        if isinstance(measurement.radii, ByRise) and not np.array_equal(radii, flat.radii):
            raise UserError(
                f"The radii of runs {first} and {run.digest} must be the same, got {radii} and {flat.radii}: "
                f"reference runs were measured again in between. Remove {run.digest} (`flatlab runs rm`) and repeat."
            )
        rows += _rises(run, label, flat)
    return pd.DataFrame(rows)


def _rises(run: RunSpec, label: str, whole: SphereFlatness) -> Iterable[dict[str, Any]]:
    rises = whole.rises or [float("nan")] * len(whole.radii)
    for panel in (SOURCE, TARGET):
        flat = part_of(whole, panel, run.held_out)
        domains = np.array([visits.mean(axis=0) for visits in flat.visits])  # (R, S)
        for radius, found, rise, each in zip(flat.radii.tolist(), flat.estimates, rises, domains, strict=True):
            yield {
                "panel": panel,
                "normalisation": flat.normalisation,
                "method": label,
                "held_out": run.held_out,
                "seed": run.seed,
                "radius": radius,
                **found.columns(),
                "over": flat.over,
                "rise": rise,
                "base_loss": float(flat.base_loss.mean()),
                "chance": flat.chance,
                "each_domain": "; ".join(f"{name} {value:.6g}" for name, value in zip(flat.strata, each, strict=True)),
                "highest": float(each.max()),
                "ratio": float(each.max() / each.mean()) if each.mean() > 0 else float("nan"),
            }


def estimate(draws: npt.ArrayLike, level: float = LEVEL) -> dict[str, float]:
    """Return mean, standard error and Student's t interval of independent draws (K,); one draw has no interval."""
    return mean_of(np.asarray(draws, dtype=float)).columns(level)


def of(about: dict[str, Any], frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame with constant columns before its own, such as those of its run."""
    return frame.assign(**about)[[*about, *frame.columns]]


def over_seeds(frame: pd.DataFrame, by: Sequence[str], *, value: str = "value") -> pd.DataFrame:
    """Return mean and interval over seeds: held-out domains are fixed strata, averaged within each seed.

    Args:
        frame: rows with `held_out`, `seed` and `value`.
        by: the columns that name a group.
        value: the column to average.

    Raises:
        UserError: if a seed of a group lacks a domain, or has one twice.
    """
    _check_crossed(frame, by)
    cells = frame.groupby([*by, "seed"], sort=False)[value]
    # A loss that is NaN stays NaN, whereas the mean of pandas would ignore it.
    per_seed: pd.DataFrame = cells.agg(lambda values: values.mean(skipna=False)).reset_index()
    groups = per_seed.groupby(list(by), sort=False)[value]
    rows = [
        {
            **dict(zip(by, keys, strict=True)),
            "held_out": "all",
            "seed": "all",
            **estimate(draws.to_numpy()),
            "over": "seeds",
        }
        for keys, draws in groups
    ]
    return pd.DataFrame(rows)


def over_seeds_within(frame: pd.DataFrame, by: Sequence[str], *, correlations: Collection[str] = ()) -> pd.DataFrame:
    """Return mean and interval over seeds, as `over_seeds` does, but within the bounds of each quantity.

    The interval is computed on a transformed scale: for shares of 1, their deviations and differences the angle whose
    squared sine is the value, for correlations the angle whose sine it is.

    Args:
        frame: rows with `quantity`, `held_out`, `seed` and `value`.
        by: the columns that name a group, `quantity` among them.
        correlations: the quantities from -1 to 1; all others are from 0 to 1.
    """
    whole = over_seeds(frame, by)
    each = frame.groupby([*by, "seed"], sort=False)["value"].agg(lambda values: values.mean(skipna=False)).reset_index()
    signed = each["quantity"].isin(correlations)
    share, correlation = each["value"].clip(0, 1), each["value"].clip(-1, 1)
    angles = np.where(signed, np.arcsin(correlation), np.arcsin(np.sqrt(share)))
    ends = over_seeds(each.assign(value=angles, held_out="all"), by)
    signed = ends["quantity"].isin(correlations)
    for end, inner in (("low", np.fmin), ("high", np.fmax)):
        back = np.where(
            signed, np.sin(ends[end].clip(-np.pi / 2, np.pi / 2)), np.sin(ends[end].clip(0, np.pi / 2)) ** 2
        )
        whole[end] = np.where(np.isnan(back), np.nan, inner(back, whole["value"]))
    return whole


def _check_crossed(frame: pd.DataFrame, by: Sequence[str]) -> None:
    groups = frame.groupby(list(by), sort=False)
    cells_of = groups["held_out"].nunique() * groups["seed"].nunique()
    if (groups.size() == cells_of).all() and not frame.duplicated([*by, "held_out", "seed"]).any():
        return  # takes a hundredth of the time of finding the cell
    for keys, group in frame.groupby(list(by), sort=False):
        cells = pd.MultiIndex.from_product([group["held_out"].unique(), group["seed"].unique()])
        counts = group.groupby(["held_out", "seed"]).size().reindex(cells, fill_value=0)
        for (target, seed), count in zip(cells, counts, strict=True):
            if count != 1:
                raise UserError(
                    f"{', '.join(map(str, keys))}: {count} rows with {target} held out and seed {seed}; "
                    "a mean over seeds needs one for each domain and seed."
                )


def paired(frame: pd.DataFrame, baseline: str, by: Sequence[str]) -> pd.DataFrame:
    """Return each method less the baseline, paired by held-out domain and seed, with intervals over seeds.

    `p` is the two-sided p-value of the paired t test, not corrected; for the correction see `verdicts.corrected`.

    Args:
        frame: rows with `method`, `held_out`, `seed` and `value`.
        baseline: the method that is subtracted.
        by: the columns that name a group within a method (panel, radius).

    Raises:
        UserError: if a row has no partner in the baseline, or a seed of a group lacks a domain.
    """
    keys = [*by, "held_out", "seed"]
    base = frame[frame["method"] == baseline].set_index(keys)["value"].rename("base")
    others = frame[frame["method"] != baseline]
    alone = others[~pd.MultiIndex.from_frame(others[keys]).isin(base.index)]
    if len(alone):
        row = alone.iloc[0]
        raise UserError(
            f"{row['method']} with {row['held_out']} held out and seed {row['seed']} has no partner of {baseline}."
        )
    joined = others.join(base, on=keys)
    joined["difference"] = joined["value"] - joined["base"]
    return against_zero(joined, ["method", *by], value="difference").assign(baseline=baseline)


def against_zero(frame: pd.DataFrame, by: Sequence[str], *, value: str = "value") -> pd.DataFrame:
    """Return mean and interval over seeds, and `p`, the two-sided p-value of the t test of a mean of zero.

    Seeds that agree up to rounding, as accuracies on few images may by chance, give neither interval nor p-value (NaN).

    Args:
        frame: rows with `held_out`, `seed` and `value`.
        by: the columns that name a group.
        value: the column that is tested.
    """
    table = over_seeds(frame, by, value=value)
    seeds = frame.groupby(list(by), sort=False)["seed"].nunique()
    estimates = zip(table["value"], table["stderr"], seeds, strict=True)
    table["p"] = [Estimate(value, stderr, max(1, count - 1)).p_value for value, stderr, count in estimates]
    table.loc[table["stderr"] <= ROUNDING * (1 + table["value"].abs()), ["low", "high", "p"]] = np.nan
    return table


def paired_each(frame: pd.DataFrame, pairs: Iterable[tuple[str, str]], by: Sequence[str]) -> pd.DataFrame:
    """Return the difference of each pair, as `paired` does.

    Args:
        frame: rows with `method`, `held_out`, `seed` and `value`.
        pairs: method, and the one that is subtracted.
        by: the columns that name a group within a method.
    """
    return pd.concat([paired(frame[frame["method"].isin(pair)], pair[1], by) for pair in pairs], ignore_index=True)


def accuracies(store: RunStore, wanted: Iterable[Labelled], *, among_all: bool = False) -> pd.DataFrame:
    """Return one row per run and selection rule: step, accuracies, evaluations on the target.

    `validation` and `test` are means over the source domains: on the images used for selection, and on those of the
    test split (NaN if a run has none). `target` is the held-out domain's; if logged, `target_percentile` is the
    percentile over its classes or groups, and `test_percentile` that of the test split.

    Args:
        store: contains the finished runs.
        wanted: method's name, run.
        among_all: adds a row for training-domain validation among all steps, if there is a switch.
    """
    rows = []
    for label, spec in wanted:
        run = store.run(spec)
        if not run.done:
            raise UserError(f"Run {spec.digest} ({label}, {spec.target}, seed {spec.seed}) is not trained yet.")
        log = selection.candidates(run.rows(), spec.settled)
        chosen = {rule: choose(log) for rule, choose in selection.rules(log).items()}
        if among_all and spec.settled:
            chosen["training-domain, all steps"] = selection.training_domain(run.rows())
        for rule, row in chosen.items():
            rows.append(
                {
                    "run": spec.digest,
                    "method": label,
                    "held_out": spec.held_out,
                    **({"corruption": spec.corruption} if spec.corruption else {}),
                    "seed": spec.seed,
                    "selection": rule,
                    "step": row["step"],
                    "validation": row["validation"],
                    "test": tested(row),
                    "target": selection.target_accuracy(row),
                    **_percentile(row),
                    "looks": (len(log) if rule == "oracle" else 1) * spec.target_logged,
                }
            )
    return pd.DataFrame(rows)


def _percentile(row: selection.Row) -> dict[str, float]:
    parts = {"target": [row.get("target", {}).get("in", {})], "test": [*row.get("test", {}).values()]}
    return {
        f"{part}_percentile": float(np.mean([score["class_percentile"] for score in scores]))
        for part, scores in parts.items()
        if scores and "class_percentile" in scores[0]
    }


def tested(row: selection.Row) -> float:
    """Return the mean accuracy on the source domains' test images; NaN if a run has none."""
    scores = [score["accuracy"] for score in row.get("test", {}).values()]
    return float(np.mean(scores)) if scores else float("nan")


def overview(store: RunStore) -> tuple[pd.DataFrame, list[str]]:
    """Return one row per run of a store: composition, state and accuracies; and a sentence for each fault.

    A damaged run has a row with the columns that can be read.
    """
    columns = ["run", "dataset", "model", "composition", "held_out", "corruption", "seed", "state", "measurements"]
    columns += ["validation", "test", "target"]
    rows, faults = [], list[str]()
    for folder in store.folders():
        row: dict[str, Any] = {"run": folder.name, "state": "damaged"}
        faults += complaints(partial(_describe, folder, row))
        if not row.pop("lends", False):
            rows.append(row)
    found = pd.DataFrame(rows, columns=columns)
    return found if found["corruption"].notna().any() else found.drop(columns="corruption"), faults


def _describe(folder: Path, row: dict[str, Any]) -> None:
    """Add the columns of a run to a row, as far as they can be read."""
    run = Run.read(folder)
    row["lends"] = run.lends
    row |= {"dataset": run.spec.dataset, "model": run.spec.model, "composition": run.spec.label}
    row |= {"held_out": run.spec.held_out, "corruption": run.spec.corruption, "seed": run.spec.seed}
    row["measurements"] = run.measured()
    log = selection.candidates(run.rows(), run.spec.settled)
    if log:
        best = selection.training_domain(log)
        row |= {"validation": best["validation"], "test": tested(best), "target": selection.target_accuracy(best)}
    row["state"] = "done" if run.done else f"step {log[-1]['step']}" if log else "begun"


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a table in markdown, fractions with three digits."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    lines = [[str(column) for column in frame.columns], ["---"] * len(frame.columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gains(accuracies: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return each method's accuracy on the held-out domain less a baseline's, as one family of tests.

    Args:
        accuracies: as `accuracies` returns them; only rows by training-domain validation are used.
        baseline: the method that is subtracted, paired by held-out domain and seed.
    """
    chosen = accuracies[accuracies["selection"] == "training-domain"].rename(columns={"target": "value"})
    found = paired(chosen.assign(panel=TARGET), baseline, ["panel"])
    return verdicts.corrected(found, pd.Series(f"Accuracy, {ACCURACY[TARGET, 'in']}", found.index))


def reached(accuracies: pd.DataFrame, gains: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method: mean accuracies, and that on the held-out domain less a baseline's.

    On the source domains it is that of the test split, if all runs have one.

    Args:
        accuracies: as `accuracies` returns them; only rows by training-domain validation are used.
        gains: as `gains` returns them.
    """
    chosen = accuracies[accuracies["selection"] == "training-domain"]
    column, split = ("validation", "out") if chosen["test"].isna().any() else ("test", "test")
    names = {column: ACCURACY[SOURCE, split], "target": ACCURACY[TARGET, "in"]}
    each = chosen.groupby("method", sort=False)[list(names)].mean().rename(columns=names)
    less = f"{ACCURACY[TARGET, 'in']} less {gains['baseline'].iloc[0]}"
    return each.assign(**{less: pd.Series(verdicts.cells(gains), gains["method"])}).fillna("").reset_index()
