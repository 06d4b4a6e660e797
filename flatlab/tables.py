"""From the store to tidy frames, and verbs on them: DataFrame in, DataFrame out, nothing remembered.

One observation is one row. `over` names the source of an interval: "directions" (this checkpoint, these images) or
"seeds" (the method). Torch-free.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from flatlab import selection
from flatlab.errors import UserError
from flatlab.metrics import rounds
from flatlab.metrics.results import Estimate, FloatArray, mean_of
from flatlab.probespecs import ProbeSpec
from flatlab.runs import Run, RunStore
from flatlab.specs import RunSpec

LEVEL = 0.95
Labelled = tuple[str, RunSpec]


def flatness(store: RunStore, wanted: Iterable[tuple[str, RunSpec, ProbeSpec]]) -> pd.DataFrame:
    """Return one row per run, panel and radius: the rise of the loss in nats, averaged over directions.

    The panel "train" is the mean over the seen domains, each weighing the same; "test" is the held-out domain.

    Args:
        store: holds the finished measurements.
        wanted: method's name, run, probe.
    """
    return pd.DataFrame([row for label, run, probe in wanted for row in _rises(store.run(run), probe, label)])


def _rises(run: Run, probe: ProbeSpec, label: str) -> Iterable[dict[str, Any]]:
    arrays, facts = run.measured(probe, label)
    target = [name == run.spec.held_out for name in facts["strata"]]
    for panel, mine in {"train": ~np.array(target), "test": np.array(target)}.items():
        for index, (radius, blocks) in enumerate(zip(arrays["radii"], facts["blocks"], strict=True)):
            rises = arrays[f"visits-{index:02d}"][:, mine].mean(axis=1)  # (J,)
            yield {
                "panel": panel,
                "normalisation": probe.normalisation,
                "method": label,
                "held_out": run.spec.held_out,
                "seed": run.spec.seed,
                "radius": float(radius),
                **_told(rounds.estimate(rises, blocks)),
                "over": "directions",
            }


def estimate(draws: FloatArray, level: float = LEVEL) -> dict[str, float]:
    """Return mean, standard error and Student's t interval of independent draws (K,); one draw has no interval."""
    return _told(mean_of(np.asarray(draws, dtype=float)), level)


def _told(found: Estimate, level: float = LEVEL) -> dict[str, float]:
    half = found.half_width(level)
    return {"value": found.value, "stderr": found.stderr, "low": found.value - half, "high": found.value + half}


def over_seeds(frame: pd.DataFrame, by: Sequence[str], *, value: str = "value") -> pd.DataFrame:
    """Return mean and interval over seeds: held-out domains are fixed strata, averaged within each seed.

    Args:
        frame: rows with `held_out`, `seed` and `value`.
        by: the columns that name a group.
        value: the column to average.

    Raises:
        UserError: where a seed of a group lacks a domain, or has one twice.
    """
    _check_crossed(frame, by)
    cells = frame.groupby([*by, "seed"], sort=False)[value]
    # A loss that is none is shown as such, where pandas' own mean would leave it out.
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


def _check_crossed(frame: pd.DataFrame, by: Sequence[str]) -> None:
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

    A column `verdict` says "lower", "higher" or "not distinguishable" as the interval lies.

    Args:
        frame: rows with `method`, `held_out`, `seed` and `value`.
        baseline: the method that is subtracted.
        by: the columns that name a group within a method (panel, radius).

    Raises:
        UserError: where a row has no partner in the baseline, or a seed of a group lacks a domain.
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
    table = over_seeds(joined, ["method", *by], value="difference")
    table["verdict"] = np.select(
        [table["high"] < 0, table["low"] > 0], ["lower", "higher"], default="not distinguishable"
    )
    return table.assign(baseline=baseline)


def accuracies(store: RunStore, wanted: Iterable[Labelled]) -> pd.DataFrame:
    """Return one row per run and selection rule: step, source validation and target accuracy, looks at the target."""
    rows = []
    for label, spec in wanted:
        run = store.run(spec)
        if not run.done:
            raise UserError(f"Run {spec.digest} ({label}, {spec.held_out}, seed {spec.seed}) is not trained yet.")
        log = selection.candidates(run.rows(), spec.settled)
        for rule, choose in selection.RULES.items():
            row = choose(log)
            rows.append(
                {
                    "run": spec.digest,
                    "method": label,
                    "held_out": spec.held_out,
                    "seed": spec.seed,
                    "selection": rule,
                    "step": row["step"],
                    "validation": row["validation"],
                    "target": row["target"]["in"]["accuracy"],
                    **_tested(row),
                    "looks": len(log) if rule == "oracle" else 1,
                }
            )
    return pd.DataFrame(rows)


def _tested(row: selection.Row) -> dict[str, float]:
    """Return the mean accuracy on the source domains' test images, where a run keeps such."""
    scores = [score["accuracy"] for score in row.get("test", {}).values()]
    return {"test": float(np.mean(scores))} if scores else {}


def overview(store: RunStore) -> pd.DataFrame:
    """Return one row per run of a store: what it is, how far it is, and what it reached."""
    columns = ["run", "dataset", "model", "composition", "held_out", "seed", "state", "probes", "validation", "target"]
    rows = []
    for run in store.runs():
        if run.lends:
            continue
        log = selection.candidates(run.rows(), run.spec.settled)
        best = selection.training_domain(log) if log else {}
        rows.append(
            {
                "run": run.spec.digest,
                "dataset": run.spec.dataset,
                "model": run.spec.model,
                "composition": run.spec.label,
                "held_out": run.spec.held_out,
                "seed": run.spec.seed,
                "state": "done" if run.done else f"step {log[-1]['step']}" if log else "begun",
                "probes": len([probe for probe in run.probes() if probe.done]),
                "validation": best.get("validation", float("nan")),
                "target": best["target"]["in"]["accuracy"] if best else float("nan"),
            }
        )
    return pd.DataFrame(rows, columns=columns)


def bracketed(value: float, low: float, high: float, *, digits: int = 3) -> str:
    """Return "value [low, high]", with a star where the interval excludes zero; one seed has no interval."""
    if not np.isfinite([low, high]).all():
        return f"{value:+.{digits}f} (no interval)"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{'*' if low * high > 0 else ''}"


def markdown(frame: pd.DataFrame) -> str:
    """Return a frame as a table in markdown, fractions with three digits."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row] for row in frame.itertuples(index=False)]
    lines = [[str(column) for column in frame.columns], ["---"] * len(frame.columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reached(accuracies: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return one row per method: mean accuracies over held-out domains and seeds, and the target's less a baseline's.

    Args:
        accuracies: as `accuracies` returns them; rows by training-domain validation count.
        baseline: the method that is subtracted, paired by held-out domain and seed.
    """
    chosen = accuracies[accuracies["selection"] == "training-domain"].rename(columns={"target": "value"})
    each = chosen.groupby("method", sort=False)[["validation", "value"]].mean().rename(columns={"value": "target"})
    less = paired(chosen.assign(target="target"), baseline, ["target"]).set_index("method")
    told = {
        name: bracketed(*row) for name, row in zip(less.index, less[["value", "low", "high"]].to_numpy(), strict=True)
    }
    return each.assign(**{f"target less {baseline}": pd.Series(told)}).fillna("").reset_index()
