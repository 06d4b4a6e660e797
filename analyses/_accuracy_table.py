"""A table of accuracies as the paper prints it: our runs line by line, with the printed numbers if comparable.

A module of `analyses/` declares lines and columns; everything else is here. Torch-free. Accuracies are percent, at the
checkpoint that training-domain validation selects; intervals are over seeds.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from analyses import _rank_agreement
from analyses._percent import BY, Panel, accuracies, ensembles, over_datasets, over_members, over_seeds
from flatlab import plots
from flatlab.analysis import Analysis, from_table
from flatlab.report import verdicts
from flatlab.report.panels import ACCURACY, SOURCE, TARGET
from flatlab.resources import published
from flatlab.specs.methods import METHODS, Labelled, is_papers, replicates
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import QUICK, SETTINGS, Setting, for_data
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY = (
    "Difference to the first line in points, paired by held-out domain and seed, 95 % intervals, each alone; "
    "* p < 0.05 after Holm over the lines of a column"
)
AVERAGE = "Avg"
GROUPS = {"Amazon": "reviewers", "Camelyon17": "hospitals"}  # else classes
COLUMNS = [*BY, "method", "held_out", "seed", "value", "stderr", "low", "high", "over"]
COLUMNS += ["published", "published_stderr", "comparable"]


class Printed(NamedTuple):
    """A number of the paper: mean and standard error over its trials."""

    value: float = float("nan")
    stderr: float = float("nan")


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        label: the line's name in our table.
        method: a key of `METHODS`.
        changes: fields of the setting that differ in this line.
        printed: identifies the paper's line, such as {"bits": 8}.
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
        lines: the others are compared with the first one.
        columns: data set -> panel -> the paper's column.
        split: of the source domains, whose accuracies the paper prints: "out" (used for selection) or "test". Ours are
            of the test split if the runs have one.
        domains: whether the paper prints a column for each held-out domain.
        average: the paper's column of the mean over all data sets, if it prints one.
        networks: for a table about another network than the paper's ResNet-50: the fields of a setting that replace it,
            by data set ("" for all others); the printed numbers are then shown in a separate block only, and
            `reproduce all` does not make the table.
        theirs: the paper's network, if another one stands in for it, as text.
        beside: settings of embedded data that are shown beside the digits.
        added: lines that --controls adds.
        scored: further splits of the held-out domain that are shown: "out", or "all" for both.
    """

    number: str
    lines: tuple[Line, ...]
    columns: Mapping[str, Mapping[str, str]]
    split: Literal["out", "test"] = "out"
    domains: bool = False
    average: str = ""
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    theirs: str = ""
    beside: tuple[Setting, ...] = ()
    added: tuple[Line, ...] = ()
    scored: tuple[str, ...] = ()

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
    def every(self) -> tuple[Line, ...]:
        """All lines, those that --controls adds included."""
        return (*self.lines, *self.added)

    def order(self, frame: pd.DataFrame) -> list[str]:
        """Return the names of the lines of a frame, in order."""
        there = set(frame["method"])
        return [line.label for line in self.every if line.label in there]

    def labelled(self, setting: Setting) -> list[Labelled]:
        """Return each run with its line's name."""
        lines = self.every if setting.controls else self.lines
        return [(line.label, run) for one in self.suited(setting).each for line in lines for run in line.runs(one)]

    def suited(self, setting: Setting) -> Setting:
        """Return the setting with the networks of the table, where no other was asked for."""
        if setting.dataset == QUICK.dataset and not setting.others:
            shown = len(setting.held_out)
            added = [
                for_data(setting, one.dataset).replace(domains=one.domains, held_out=one.held_out[:shown])
                for one in self.beside
            ]
            setting = setting.replace(others=tuple(added))
        first, *others = (one.replace(**self._network(one)) for one in setting.each)
        return first.replace(others=tuple(others))

    def _network(self, one: Setting) -> Mapping[str, Any]:
        """Return the fields of the table that replace those which the setting has by default.

        With another network none is replaced, except on data with named splits, whose protocol is the paper's.
        """
        usual, fields = for_data(SETTINGS[one.name], one.dataset), self.networks.get(one.dataset)
        fields = self.networks.get("", {}) if fields is None else fields
        if one.model != usual.model and not one.named:
            return {}
        return {name: value for name, value in fields.items() if getattr(one, name) == getattr(usual, name)}

    def table(self, store: RunStore, setting: Setting) -> pd.DataFrame:
        """Return accuracies in percent: of each run, over seeds of each held-out domain and of their mean.

        For an ensemble also the mean over its single members (`over` is "members").
        """
        setting = self.suited(setting)
        wanted, panels = self.labelled(setting), self._panels(setting)
        each = accuracies(store, wanted, panels)
        if self.average and each["dataset"].nunique() > 1:
            each = pd.concat([each, over_datasets(each, self._average(setting))], ignore_index=True)
        parts = [each.assign(over="run"), *over_seeds(each), *over_members(store, wanted, panels)]
        return self._with_published(pd.concat(parts, ignore_index=True), setting)[COLUMNS]

    def _average(self, setting: Setting) -> str:
        """Return the name of the mean over the data sets present: the paper's, if all are."""
        there = [one.dataset for one in setting.each]
        return f"{AVERAGE}." if {*there} == {*self.columns} else f"{AVERAGE} of {', '.join(there)}"

    def _panels(self, setting: Setting) -> list[Panel]:
        """Return panels and splits; of the source domains the test split, if the runs have one."""
        declared = dict.fromkeys(panel for panels in self.columns.values() for panel in panels)
        splits = {SOURCE: "test" if setting.test_share or setting.named else self.split, TARGET: "in"}
        panels = [(panel, splits[panel]) for panel in declared] + [(TARGET, split) for split in self.scored]
        if setting.class_percentile is None:
            return panels
        return panels + [(panel, "percentile") for panel, split in panels if split in ("in", "test")]

    def printed(self, label: str, dataset: str, panel: Panel, held_out: str) -> Printed:
        """Return the paper's number for one of ours; NaN if it printed none."""
        line = next(line for line in self.every if line.label == label)
        columns = {**self.columns, f"{AVERAGE}.": {TARGET: self.average}}.get(dataset, {})
        other = (SOURCE, "test" if self.split == "out" else "out")
        of_domain = self.domains and held_out != "all"
        if not columns or (held_out != "all" and not self.domains):
            return Printed()
        column = held_out if of_domain else "" if panel == other else columns.get(panel[0], "")
        rows = [row for row in self.facts["rows"] if line.printed and line.printed.items() <= row.items()]
        found = rows[0].get(column) if rows else None
        if not isinstance(found, dict):
            return Printed()
        return Printed(found["mean"], np.nan if found["std"] is None else found["std"])

    def _with_published(self, frame: pd.DataFrame, setting: Setting) -> pd.DataFrame:
        """Fill in the printed numbers, but only for the paper's data and protocol."""
        same = self._same(setting)
        beside = [
            self.printed(method, dataset, (panel, split), held_out)
            if over == "seeds" and (method, dataset, held_out == "all") in same
            else Printed()
            for dataset, panel, split, method, held_out, over in frame[[*BY, "method", "held_out", "over"]].itertuples(
                index=False
            )
        ]
        theirs = pd.DataFrame(beside, columns=["published", "published_stderr"], index=frame.index)
        return frame.join(theirs).assign(comparable=theirs["published"].notna())

    def _same(self, setting: Setting) -> set[tuple[str, str, bool]]:
        """Return method, data set, and whether it is the mean over held-out domains, for all comparable cells."""
        same = set()
        for line in () if self.networks else self.lines:
            alike = {one.dataset: is_papers(METHODS[line.method], one, line.changes) for one in setting.each}
            whole = {one.dataset: {*one.held_out} == {*one.domains} for one in setting.each}
            same |= {(line.label, name, False) for name in alike if alike[name]}
            same |= {(line.label, name, True) for name in alike if alike[name] and whole[name]}
            if all(alike.values()) and all(whole.values()):
                same.add((line.label, self._average(setting), True))
        return same

    def as_published(self) -> pd.DataFrame:
        """Return the lines as the paper prints them, as a separate table."""
        rows: dict[str, dict[str, str]] = {}
        for line in self.every:
            found = [row for row in self.facts["rows"] if line.printed and line.printed.items() <= row.items()]
            for row in found if "dataset" in self.facts["columns"] else found[:1]:
                cells = {name: cell for name, cell in row.items() if isinstance(cell, dict)}
                rows[f"{row['dataset']}, {line.label}" if "dataset" in row else line.label] = {
                    name: plus_minus(cell["mean"], np.nan if cell["std"] is None else cell["std"])
                    for name, cell in cells.items()
                }
        return _laid_out(rows)

    def findings(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the differences of all pairs of lines in points; if comparable to the paper, whether they agree.

        Families, in each panel: the differences to the first line, and those of the other pairs.
        """
        return _rank_agreement.pairs(frame, self.order(frame))

    def summary(self, findings: pd.DataFrame) -> pd.DataFrame:
        """Return each line's difference to the baseline, a column for each panel."""
        rows: dict[str, dict[str, str]] = {}
        for row in findings[findings["baseline"] == self.baseline].to_dict("records"):
            cells, where = rows.setdefault(row["method"], {}), _title(row)
            starred = row["p_holm"] < verdicts.LEVEL
            cells[where] = verdicts.bracketed(row["value"], row["low"], row["high"], digits=2, starred=starred)
            if row["agrees"]:
                cells[f"published ({where})"] = f"{row['published']:+.1f}"
                cells[f"order agrees ({where})"] = row["agrees"]
        return _laid_out(rows)

    def sheet(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return the table as the paper prints one: mean and standard error over seeds; published if comparable."""
        shown = frame[(frame["over"] == "seeds") & ((frame["held_out"] == "all") | (frame["panel"] == TARGET))]
        rows: dict[str, dict[str, str]] = {label: {} for label in self.order(frame)}
        for row in shown.to_dict("records"):
            where = f"{_title(row)}, {'mean' if row['held_out'] == 'all' else row['held_out']}"
            rows[row["method"]][where] = plus_minus(row["value"], row["stderr"])
            if row["comparable"]:
                beside = plus_minus(row["published"], row["published_stderr"])
                rows[row["method"]][f"published ({where})"] = beside
        return _laid_out(rows)

    def remarks(self, frame: pd.DataFrame) -> list[str]:
        """Return sentences on the tests, on the gains of ensembles, and on anomalies of the printed numbers."""
        found = self.findings(frame)
        first = found[found["baseline"] == self.baseline]
        sentences = [*verdicts.sentences(first, unit="points", digits=2), verdicts.statement(first)]
        there = found[BY].drop_duplicates().itertuples(index=False)
        sentences += [
            _rank_agreement.sentence(frame, found, dataset, (panel, split)) for dataset, panel, split in there
        ]
        return [sentence for sentence in [*sentences, *ensembles(frame)] if sentence] + self.notes(self.order(frame))

    def notes(self, made: Collection[str] = ()) -> list[str]:
        """Return the printed lines that are not made here, and the known misprints and contradictions of the table."""
        odd = [f"As printed: {each}." for each in published()["anomalies"] if self.number in _tables_named(each)]
        lines = (*self.lines, *(line for line in self.added if line.label in made))
        ours = [line.printed.items() for line in lines if line.printed]
        rows = [row for row in self.facts["rows"] if not any(mine <= row.items() for mine in ours)]
        names = ", ".join(str(next(iter(row.values()))) for row in rows)
        return [f"Printed, and not made here: {names}.", *odd] if names else odd

    def protocol(self, setting: Setting) -> str:
        """Return sentences on the held-out domains, the checkpoint and the mean."""
        setting = self.suited(setting)
        held_out = "; ".join(f"{one.dataset}: {', '.join(one.held_out)}" for one in setting.each)
        rule = "Checkpoint by training-domain validation; mean over held-out domains."
        rule += " Of the held-out domain the in split is shown where none is named." if self.scored else ""
        named = " Named splits: selected on val; the test split is id_test, or id_val." if setting.named else ""
        if setting.class_percentile is None:
            return f"Held out in turn: {held_out}. {rule}{named}"
        groups = " and ".join(dict.fromkeys(GROUPS.get(one.dataset, "classes") for one in setting.each))
        share = f" Percentile over groups: {setting.class_percentile:g} % quantile of the accuracies of {groups}."
        return f"Held out in turn: {held_out}. {rule}{named}{share}"

    def caption(self, setting: Setting) -> str:
        """Return title and notes: data, seeds, intervals."""
        bars = f"Bars: {setting.interval}. Right: less {self.baseline}, paired by held-out domain and seed."
        setting = self.suited(setting)
        if self.theirs:
            models = " and ".join(f"{one.model}, weights {one.weights[:15]}," for one in setting.each)
            bars = f"{models} in place of the paper's {self.theirs}. {bars}"
        return f"Table {self.number}: {setting.words}\n{self.protocol(setting)} {bars}"

    def draw(self, frame: pd.DataFrame, caption: str) -> "Figure":
        """Draw a row of two panels for each column of the table: accuracies, and differences to the baseline."""
        whole = frame[(frame["over"] == "seeds") & (frame["held_out"] == "all")]
        less = self.findings(frame)
        less = less[less["baseline"] == self.baseline].assign(comparable=lambda each: each["published"].notna())
        return plots.forest(
            whole.assign(row=_titles(whole)),
            less.assign(row=_titles(less)),
            order=self.order(frame),
            axes=("Accuracy (%)", "Difference (points)"),
            caption=caption,
        )

    def figure(self, module: str, doc: str) -> Analysis:
        """Return the declaration of the table."""
        return Analysis(
            module,
            doc,
            self.baseline,
            labelled=self.labelled,
            table=self.table,
            findings=self.findings,
            summary=self.summary,
            summary_title=SUMMARY,
            remarks=self.remarks,
            caption=self.caption,
            draw=from_table(self.draw),
            sheet=self.sheet,
            as_published=self.as_published,
            alone=bool(self.networks),
        )


def domains_table(number: str, dataset: str) -> PaperTable:
    """Return a table of the accuracies on each held-out domain of a data set (Tables 7 and 8)."""
    names = {"ERM": "ERM (our runs)", **{name: name for name in ("SWAD", "EoA", "QT-DoG", "EoQ")}}
    lines = tuple(Line(name, name, printed={"algorithm": theirs}) for name, theirs in names.items())
    return PaperTable(number, lines, {dataset: {"target": "Avg"}}, domains=True)


def bit_widths(widths: Sequence[int]) -> tuple[Line, ...]:
    """Return lines that differ only in the bits of a weight, after that of ERM."""
    quantized = (Line(f"{bits} bit", "QT-DoG", {"bits": bits}, {"bits": bits}) for bits in widths)
    return (Line("ERM", "ERM", printed={"bits": 32}), *quantized)


def _laid_out(rows: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """Return a row for each method; missing cells are empty."""
    return pd.DataFrame([{"method": method, **cells} for method, cells in rows.items()]).fillna("")


def _titles(frame: pd.DataFrame) -> list[str]:
    return [_title(row) for row in frame[BY].to_dict("records")]


def _title(row: Mapping[Any, Any]) -> str:
    return f"{row['dataset']}, {ACCURACY[row['panel'], row['split']]}"


def plus_minus(value: float, stderr: float) -> str:
    """Return "mean ± standard error"; only the mean if there is no error."""
    return f"{value:.1f}" if np.isnan(stderr) else f"{value:.1f} ± {stderr:.1f}"


def _tables_named(sentence: str) -> set[str]:
    return {number for pair in re.findall(r"Tables? (\d+)(?: and (\d+))?", sentence) for number in pair if number}
