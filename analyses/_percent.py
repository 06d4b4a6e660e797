"""Accuracies in percent: of each run, over seeds, over data sets, over the members of ensembles. Torch-free."""

from collections.abc import Iterator

import pandas as pd

from flatlab.report import stability, tables
from flatlab.report.panels import SOURCE, TARGET
from flatlab.specs.methods import Labelled
from flatlab.store.runs import RunStore

Panel = tuple[str, str]  # and split
READ = {  # entry of a log's row
    **{(SOURCE, "out"): "validation", (SOURCE, "test"): "test", (TARGET, "in"): "target"},
    **{(SOURCE, "percentile"): "test_percentile", (TARGET, "percentile"): "target_percentile"},
    **{(TARGET, "out"): "target_out", (TARGET, "all"): "target_all"},
}
SPLITS = {"out": ("out",), "all": ("in", "out")}  # of the held-out domain, whose accuracies are weighted by images
BY = ["dataset", "panel", "split"]


def accuracies(store: RunStore, wanted: list[Labelled], panels: list[Panel]) -> pd.DataFrame:
    """Return a row for each run and panel: the accuracy in percent.

    Args:
        store: contains the finished runs.
        wanted: line's name, run.
        panels: each with its split, of `READ`.
    """
    found = tables.accuracies(store, wanted)
    found = found[found["selection"] == "training-domain"]
    found = found.assign(dataset=found["run"].map({run.digest: run.dataset for _, run in wanted}))
    shared = ["dataset", "method", "held_out", "seed"]
    for split in SPLITS.keys() & {split for panel, split in panels if panel == TARGET}:
        found[READ[TARGET, split]] = _of_target(store, wanted, found, split)
    return pd.concat(
        [
            found[shared].assign(panel=panel, split=split, value=100 * found[READ[panel, split]])
            for panel, split in panels
        ],
        ignore_index=True,
    )


def _of_target(store: RunStore, wanted: list[Labelled], found: pd.DataFrame, split: str) -> list[float]:
    """Return the accuracy of each selected checkpoint on the held-out domain's "out" split, or on both."""
    logs = {run.digest: {row["step"]: row for row in store.run(run).rows()} for _, run in wanted}
    chosen = [logs[run][step]["target"] for run, step in zip(found["run"], found["step"], strict=True)]
    parts = [[target[part] for part in SPLITS[split]] for target in chosen]
    return [sum(p["accuracy"] * p["n"] for p in each) / sum(p["n"] for p in each) for each in parts]


def unrest(store: RunStore, wanted: list[Labelled], since: int) -> pd.DataFrame:
    """Return spread and mean change of the accuracy on the held-out domain from a step on, in points, of each run.

    Runs without a log of their own trajectory are left out: derived ones, and averages except SMA.
    """
    logged = [(name, run) for name, run in wanted if run.average.kind in ("last", "sma") and not run.derived]
    found = stability.numbers(stability.curves(store, logged), since)
    long = found.melt(["method", "held_out", "seed"], ["spread", "change"], "measure")
    return long.assign(value=100 * long["value"])


def over_datasets(each: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the mean over data sets, each the mean over its held-out domains, in the form of a data set."""
    keys = [*BY[1:], "method", "seed"]
    means = each.groupby([*keys, "dataset"], sort=False)["value"].mean()
    return means.groupby(level=keys, sort=False).mean().reset_index().assign(dataset=name, held_out="all")


def over_seeds(each: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Return mean and interval (within 0 and 100 %) over seeds of each line: over all held-out domains, and each."""
    yield _bounded(each)
    for target, mine in each[each["held_out"] != "all"].groupby("held_out", sort=False):
        yield _bounded(mine).assign(held_out=target)


def _bounded(each: pd.DataFrame) -> pd.DataFrame:
    shares = each.assign(quantity="target", value=each["value"] / 100)
    found = tables.over_seeds_within(shares, [*BY, "method", "quantity"]).drop(columns="quantity")
    percent = ["value", "stderr", "low", "high"]
    return found.assign(**{name: 100 * found[name] for name in percent})


def over_members(store: RunStore, wanted: list[Labelled], panels: list[Panel]) -> Iterator[pd.DataFrame]:
    """Return the mean over an ensemble's members of their own accuracies, and over held-out domains of that."""
    alone = [(label, member) for label, run in wanted for member in run.members]
    if not alone:
        return
    each = accuracies(store, alone, panels)
    keys = [*BY, "method"]
    by_domain = each.groupby([*keys, "held_out"], sort=False)["value"].mean().reset_index()
    over_all = by_domain.groupby(keys, sort=False)["value"].mean().reset_index().assign(held_out="all")
    yield pd.concat([by_domain, over_all], ignore_index=True).assign(seed="all", over="members")


def ensembles(frame: pd.DataFrame) -> Iterator[str]:
    """Yield a sentence on the gains of ensembles over the mean of their members; ensembles have no interval."""
    mine = frame[(frame["held_out"] == "all") & (frame["panel"] == TARGET)]
    keys = [*BY, "method"]
    members, whole = (mine[mine["over"] == over][[*keys, "value"]] for over in ("members", "seeds"))
    both = members.merge(whole, on=keys, suffixes=("_members", ""))
    for dataset, rows in both.groupby("dataset", sort=False):
        less = zip(rows["method"], rows["value"] - rows["value_members"], strict=True)
        gains = ", ".join(f"{method} {gain:+.2f}" for method, gain in less)
        yield (
            f"{dataset}, held-out domain, ensembles less the mean of their members, in points, without an interval: "
            f"{gains}. Above, an ensemble is compared with the mean of the other line over all its seeds."
        )
