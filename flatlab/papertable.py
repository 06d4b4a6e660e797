"""A table of accuracies as the paper prints it: our runs line by line, the printed numbers beside them, and the order.

A module of `analyses/` declares lines and columns, and takes everything else from here. Torch-free. Accuracies are
percent, at the checkpoint that training-domain validation selects; intervals are over seeds.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from flatlab import orders, plots, tables
from flatlab.methods import METHODS, replicates
from flatlab.resources import published
from flatlab.runs import RunStore
from flatlab.settings import PAPER, Setting, for_data
from flatlab.specs import RunSpec

SUMMARY = "Difference to the first line in points, paired by held-out domain and seed, 95 % intervals; * excludes 0"
AVERAGE = "Avg"
READ = {"in": "validation", "test": "test", "out": "target"}  # panel -> what of a log's row
COLUMNS = [*orders.BY, "method", "held_out", "seed", "value", "stderr", "low", "high", "over"]
COLUMNS += ["published", "published_stderr", "published_on", "comparable"]
PROTOCOL = ("model", "weights", "freeze_batchnorm", "image_size", "augment", "steps", "eval_every", "batch_size", "lr")


class Printed(NamedTuple):
    """A number of the paper: mean and standard error over its trials, and the data set that it is of."""

    value: float = float("nan")
    stderr: float = float("nan")
    dataset: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        label: the line's name in our table.
        method: a key of `METHODS`.
        changes: fields of the setting, as this line has them.
        printed: what tells the paper's line from its others, such as {"bits": 8}.
    """

    label: str
    method: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    printed: Mapping[str, Any] = field(default_factory=dict)

    def runs(self, setting: Setting) -> list[RunSpec]:
        """Return the line's runs: one for each held-out domain and seed."""
        return replicates(METHODS[self.method], setting.replace(**self.changes))


@dataclass(frozen=True)
class PaperTable:
    """A table: its number in the paper, its lines (the first is the baseline), and the paper's columns.

    Attributes:
        number: as in published.json.
        lines: the first one is what the others are compared with.
        columns: data set -> panel ("in", "out") -> the paper's column. The first data set stands in for one that the
            paper lacks: the order of its lines is what ours is held against.
        domains: whether the paper prints a column for each held-out domain.
        average: the paper's column of the mean over all data sets, where it prints one.
    """

    number: str
    lines: tuple[Line, ...]
    columns: Mapping[str, Mapping[str, str]]
    domains: bool = False
    average: str = ""

    @property
    def baseline(self) -> str:
        """The line that is subtracted."""
        return self.lines[0].label

    @property
    def facts(self) -> dict[str, Any]:
        """The table as the paper prints it."""
        found: dict[str, Any] = published()["tables"][self.number]
        return found

    @property
    def order(self) -> list[str]:
        """The lines' names, in order."""
        return [line.label for line in self.lines]

    def labelled(self, setting: Setting) -> list[tuple[str, RunSpec]]:
        """Return each run with its line's name."""
        return [(line.label, run) for one in setting.each for line in self.lines for run in line.runs(one)]

    def plan(self, setting: Setting) -> tuple[list[RunSpec], list[Any]]:
        """Return the runs that the table needs; it measures nothing."""
        return [run for _, run in self.labelled(setting)], []

    def table(self, store: RunStore, setting: Setting) -> pd.DataFrame:
        """Return accuracies in percent: of each run, and over seeds of each held-out domain and of their mean."""
        each = accuracies(store, self.labelled(setting), list(self._panels()))
        if self.average and each["dataset"].nunique() > 1:
            each = pd.concat([each, _over_datasets(each, self._average(setting))], ignore_index=True)
        whole = pd.concat([each.assign(over="run"), *_over_seeds(each)], ignore_index=True)
        return self._with_published(whole, setting)[COLUMNS]

    def _average(self, setting: Setting) -> str:
        """Return the name of the mean over the data sets at hand: the paper's, where they are all there."""
        there = [one.dataset for one in setting.each]
        return f"{AVERAGE}." if {*there} == {*self.columns} else f"{AVERAGE} of {', '.join(there)}"

    def _panels(self) -> dict[str, None]:
        return dict.fromkeys(panel for panels in self.columns.values() for panel in panels)

    def printed(self, label: str, dataset: str, panel: str, held_out: str) -> Printed:
        """Return the paper's number beside one of ours; none where it printed none."""
        line = next(line for line in self.lines if line.label == label)
        columns = {**self.columns, f"{AVERAGE}.": {"out": self.average}}  # of all; of some the paper prints none
        ours = dataset in columns or dataset.startswith(AVERAGE)
        known = dataset if ours else next(iter(columns))
        column = held_out if self.domains and held_out != "all" else columns.get(known, {}).get(panel, "")
        rows = [row for row in self.facts["rows"] if line.printed and line.printed.items() <= row.items()]
        found = rows[0].get(column) if rows and (held_out == "all" or self.domains) else None
        if not isinstance(found, dict):
            return Printed()
        return Printed(found["mean"], np.nan if found["std"] is None else found["std"], known)

    def _with_published(self, frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
        """Fill in what the paper printed, and say where it did the same as we: on the same data, by its protocol."""
        same = {one.dataset: is_papers(one) for one in setting.each}
        same[self._average(setting)] = all(same.values())
        told = [
            self.printed(method, dataset, panel, held_out) if over == "seeds" else Printed()
            for dataset, panel, method, held_out, over in frame[[*orders.BY, "method", "held_out", "over"]].itertuples(
                index=False
            )
        ]
        beside = pd.DataFrame(told, columns=["published", "published_stderr", "published_on"], index=frame.index)
        comparable = (beside["published_on"] == frame["dataset"]) & frame["dataset"].map(same)
        return frame.join(beside).assign(comparable=comparable)

    def findings(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the differences of all pairs of lines in points, and whether their order is the paper's."""
        return orders.pairs(frame, self.order)

    def summary(self, findings: pd.DataFrame) -> pd.DataFrame:
        """Return each line's difference to the baseline, a column for each panel, and the paper's beside it."""
        rows: dict[str, dict[str, str]] = {}
        for row in findings[findings["baseline"] == self.baseline].to_dict("records"):
            cells = rows.setdefault(row["method"], {})
            told = tables.bracketed(row["value"], row["low"], row["high"], digits=2)
            cells[f"{row['dataset']}, {orders.PANELS[row['panel']]}"] = told
            if row["agrees"]:
                cells[f"published ({row['published_on']}, {row['panel']})"] = f"{row['published']:+.1f}"
                cells[f"order agrees ({row['dataset']}, {row['panel']})"] = row["agrees"]
        return _laid_out(rows)

    def sheet(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the table as the paper prints one: mean and standard error over seeds, the published ones beside."""
        shown = frame[(frame["over"] == "seeds") & ((frame["held_out"] == "all") | (frame["panel"] == "out"))]
        rows: dict[str, dict[str, str]] = {label: {} for label in self.order}
        for row in shown.to_dict("records"):
            where = f"{row['panel']}, {'mean' if row['held_out'] == 'all' else row['held_out']}"
            rows[row["method"]][f"{row['dataset']} {where}"] = plus_minus(row["value"], row["stderr"])
            if not np.isnan(row["published"]):
                beside = plus_minus(row["published"], row["published_stderr"])
                rows[row["method"]][f"published ({row['published_on']} {where})"] = beside
        return _laid_out(rows)

    def remarks(self, frame: pd.DataFrame) -> list[str]:
        """Say whether the order of the lines is the paper's, and what is odd about the printed numbers."""
        found = self.findings(frame)
        panels = found[orders.BY].drop_duplicates().itertuples(index=False)
        told = [orders.sentence(frame, found, *panel) for panel in panels]
        return [sentence for sentence in [*told, self._lone(frame)] if sentence] + self.notes()

    def _lone(self, frame: pd.DataFrame) -> str:
        """Name the lines with fewer seeds than the baseline: their means stand beside others than their differences."""
        seeds = frame[frame["over"] == "run"].groupby("method")["seed"].nunique()
        fewer = [label for label in self.order if seeds[label] < seeds[self.baseline]]
        how = "compared with the others at the seeds that both have, not with their means over all seeds"
        return f"{', '.join(fewer)}: {how}." if fewer else ""

    def notes(self) -> list[str]:
        """Return the printed lines that are not made here, and the known misprints and contradictions of the table."""
        odd = [f"As printed: {each}." for each in published()["anomalies"] if self.number in _tables_named(each)]
        ours = [line.printed.items() for line in self.lines if line.printed]
        rows = [row for row in self.facts["rows"] if not any(mine <= row.items() for mine in ours)]
        names = ", ".join(str(next(iter(row.values()))) for row in rows)
        return [f"Printed, and not made here: {names}.", *odd] if names else odd

    def protocol(self, setting: Setting) -> str:
        """Say which domains are held out, and how the numbers come about."""
        held_out = "; ".join(f"{one.dataset}: {', '.join(one.held_out)}" for one in setting.each)
        return f"Held out in turn: {held_out}. Checkpoint by training-domain validation; mean over held-out domains."

    def caption(self, setting: Setting) -> str:
        """Say in a title and a line below which data and seeds the picture shows."""
        bars = f"Bars: 95 % intervals over seeds. Right: less {self.baseline}, paired by held-out domain and seed."
        return f"Table {self.number}: {setting.words}\n{self.protocol(setting)} {bars}"

    def draw(self, frame: pd.DataFrame, caption: str) -> Figure:
        """Draw a row of two panels for each column of the table: accuracies, and differences to the baseline."""
        whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")]
        less = self.findings(frame)
        less = less[less["baseline"] == self.baseline].merge(whole[[*orders.BY, "method", "comparable"]])
        return plots.forest(
            whole.assign(row=_titles(whole)),
            less.assign(row=_titles(less)),
            order=self.order,
            axes=("Accuracy (%)", "Difference (points)"),
            caption=caption,
        )


def accuracies(store: RunStore, wanted: list[tuple[str, RunSpec]], panels: list[str]) -> pd.DataFrame:
    """Return a row for each run and panel: the accuracy in percent.

    Args:
        store: holds the finished runs.
        wanted: line's name, run.
        panels: "in" (source validation) and "out" (the held-out domain).
    """
    found = tables.accuracies(store, wanted)
    found = found[found["selection"] == "training-domain"]
    found = found.assign(dataset=found["run"].map({run.digest: run.dataset for _, run in wanted}))
    shared = ["dataset", "method", "held_out", "seed"]
    return pd.concat(
        [found[shared].assign(panel=panel, value=100 * found[READ[panel]]) for panel in panels], ignore_index=True
    )


def _over_datasets(each: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return the mean over data sets, each the mean over its held-out domains, as that of one more data set."""
    keys = ["panel", "method", "seed"]
    means = each.groupby([*keys, "dataset"], sort=False)["value"].mean()
    return means.groupby(level=keys, sort=False).mean().reset_index().assign(dataset=name, held_out="all")


def _laid_out(rows: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """Return a row for each method, with empty cells where there is nothing to tell."""
    return pd.DataFrame([{"method": method, **cells} for method, cells in rows.items()]).fillna("")


def _over_seeds(each: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Return mean and interval over seeds of each line: the mean over held-out domains, and each of them."""
    yield tables.over_seeds(each, [*orders.BY, "method"])
    for target, mine in each[each["held_out"] != "all"].groupby("held_out", sort=False):
        yield tables.over_seeds(mine, [*orders.BY, "method"]).assign(held_out=target)


def is_papers(setting: Setting) -> bool:
    """Whether a setting is the paper's own for its data set, but for seeds and held-out domains."""
    theirs = for_data(PAPER, setting.dataset)
    return all(getattr(setting, name) == getattr(theirs, name) for name in PROTOCOL)


def _titles(frame: pd.DataFrame) -> list[str]:
    return [
        f"{dataset}, {orders.PANELS[panel]}" for dataset, panel in zip(*(frame[by] for by in orders.BY), strict=True)
    ]


def plus_minus(value: float, stderr: float) -> str:
    """Return "mean ± standard error"; without the latter where there is none."""
    return f"{value:.1f}" if np.isnan(stderr) else f"{value:.1f} ± {stderr:.1f}"


def _tables_named(sentence: str) -> set[str]:
    return {number for pair in re.findall(r"Tables? (\d+)(?: and (\d+))?", sentence) for number in pair if number}
