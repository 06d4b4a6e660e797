"""The declaration of a figure or table by a module of `analyses/`, as one object."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING

import pandas as pd

from flatlab.files import Arrays
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.methods import METHODS, Labelled, replicates
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measured = Sequence[tuple[RunSpec, MeasurementSpec]]
Draw = Callable[[pd.DataFrame, str, Arrays], "Figure"]  # from the table, the caption and the arrays


@dataclass(frozen=True)
class Analysis:
    """A figure or table: its runs and measurements, its table, findings and text, and its picture."""

    module: str  # name of its module; the last part is the name of the figure
    doc: str  # docstring of its module; its first line describes the figure
    baseline: str  # the method with which the others are compared
    labelled: Callable[[Setting], list[Labelled]]  # each run with its method's name
    table: Callable[[RunStore, Setting], pd.DataFrame]
    findings: Callable[[pd.DataFrame], pd.DataFrame]  # differences in the table, with their tests
    summary: Callable[[pd.DataFrame], pd.DataFrame]  # of the findings, for the page
    summary_title: str
    remarks: Callable[[pd.DataFrame], list[str]]  # sentences on the tests of the table
    caption: Callable[[Setting], str]  # title, line feed, notes
    draw: Draw
    measured: Callable[[Setting], Measured] = lambda setting: ()
    arrays: Callable[[pd.DataFrame, RunStore, Setting], Arrays] | None = None  # drawn in addition to the table
    opening: Callable[[pd.DataFrame], list[str]] = lambda findings: []  # remarks that stand before all tables of a page
    sheet: Callable[[pd.DataFrame], pd.DataFrame] | None = None  # accuracies in the form of the paper's table
    sheet_title: str = ""  # of these, if they are not the paper's accuracies
    as_published: Callable[[], pd.DataFrame] | None = None  # the paper's numbers
    rows: bool = False  # takes rows of an earlier store (--rows)
    alone: bool = False  # made only if it is named, not by `reproduce all`

    @property
    def name(self) -> str:
        """The name of the figure, such as fig3."""
        return self.module.rsplit(".", 1)[-1]

    @property
    def title(self) -> str:
        """What the figure shows, in one line."""
        return self.doc.splitlines()[0]

    def plan(self, setting: Setting) -> tuple[list[RunSpec], list[tuple[RunSpec, MeasurementSpec]]]:
        """Return the runs and the measurements that the figure needs."""
        return [run for _, run in self.labelled(setting)], list(self.measured(setting))


def by_method(names: Iterable[str]) -> Callable[[Setting], list[Labelled]]:
    """Return a function that returns all runs of these methods, each with its method's name."""
    return lambda setting: [(name, run) for name in names for run in replicates(METHODS[name], setting)]


def crossed(labelled: Iterable[Labelled], measurements: Sequence[MeasurementSpec]) -> Measured:
    """Return each run with each measurement."""
    return [(run, measurement) for _, run in labelled for measurement in measurements]


def from_table(draw: Callable[[pd.DataFrame, str], "Figure"]) -> Draw:
    """Return a function that draws from the table only."""
    return lambda frame, caption, _: draw(frame, caption)


def once(findings: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Decorate `findings` of a figure to be computed once for a frame, since remarks, page and picture use them."""
    kept: list[pd.DataFrame] = []  # the last frame and its findings

    @wraps(findings)
    def asked(frame: pd.DataFrame) -> pd.DataFrame:
        if not kept or kept[0] is not frame:
            kept[:] = frame, findings(frame)
        return kept[1].copy()

    return asked
