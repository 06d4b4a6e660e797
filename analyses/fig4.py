"""Figure 4: accuracy on source and held-out domains along the training, ERM against QT-DoG, on two targets.

The paper shows TerraIncognita's location_100 and location_46, and a line at the beginning of quantization. The numbers
beside the curves measure stability over the evaluations from the switch on, the same for all methods. `--controls` adds
two runs: the convolutions frozen at the switch without any quantization, and what the released code trains.
"""

from typing import TYPE_CHECKING

import pandas as pd

from flatlab.analysis import Analysis, by_method, from_table
from flatlab.report import stability, tables, verdicts
from flatlab.resources import published
from flatlab.specs.methods import RELEASED, Labelled
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "ERM"
ORDER = ("ERM", "QT-DoG")
CONTROLS = ("freeze", "release-parity")
COLUMNS = ["quantity", "method", "held_out", "seed", "step", "value", "stderr", "low", "high", "over", "switch"]
SUMMARY = (
    "Less ERM in points (the correlation as such), paired by held-out domain and seed, 95 % intervals over seeds, each "
    "alone; * p < 0.05 after Holm over the numbers and methods"
)


def order(setting: Setting) -> tuple[str, ...]:
    """Return the methods that are shown."""
    return ORDER + (CONTROLS if setting.controls else ())


def targets(setting: Setting) -> tuple[str, ...]:
    """Return the two held-out domains: the paper's if the data have them, else the first and the last."""
    paper = [name for name in published()["figures"]["4"]["test_domains"] if name in setting.held_out]
    return tuple(paper) or tuple(dict.fromkeys((setting.held_out[0], setting.held_out[-1])))


def labelled(setting: Setting) -> list[Labelled]:
    """Return each run with its method's name."""
    return by_method(order(setting))(setting.replace(held_out=targets(setting)))


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return curves and numbers: of each run, of each method and target over seeds, and of each method over both."""
    along = stability.curves(store, labelled(setting))
    numbers = stability.numbers(along, setting.switch_step).drop(columns="points")
    numbers = numbers.melt(["method", "held_out", "seed"], var_name="quantity").assign(step=float("nan"))
    parts = [along.assign(over="run"), numbers.assign(over="run")]
    for target in targets(setting):
        for frame, by in ((along, ["quantity", "method", "step"]), (numbers, ["quantity", "method"])):
            mine = frame[frame["held_out"] == target]
            parts.append(tables.over_seeds_within(mine, by, correlations=[stability.UNITLESS]).assign(held_out=target))
    parts.append(tables.over_seeds_within(numbers, ["quantity", "method"], correlations=[stability.UNITLESS]))
    return pd.concat(parts, ignore_index=True).assign(switch=setting.switch_step).reindex(columns=COLUMNS)


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return each method's numbers less ERM's in points, paired by held-out domain and seed; one family of tests."""
    each = frame[(frame["over"] == "run") & frame["step"].isna()]
    percent = each["quantity"].ne(stability.UNITLESS).map({True: 100.0, False: 1.0})
    found = tables.paired(each.assign(value=percent * each["value"]), BASELINE, ["quantity"])
    since = int(frame["switch"].iloc[0])
    return verdicts.corrected(found, pd.Series(f"Stability from step {since} on", found.index))


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return the findings, a line per method."""
    cells = findings.assign(
        where=findings["quantity"].map(stability.NUMBERS),
        cell=verdicts.cells(findings, digits=2),
    )
    return cells.pivot_table(index="method", columns="where", values="cell", aggfunc="first", sort=False).reset_index()


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the tests of the numbers."""
    tested = findings(frame)
    sentences = verdicts.sentences(tested.assign(at=tested["quantity"].map(stability.NUMBERS).str.lower()), place="in")
    shown = set(frame["method"])
    return [*sentences, verdicts.statement(tested), *([RELEASED] if "release-parity" in shown else [])]


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, intervals, splits."""
    over = {1: "on {}", 2: "over both targets"}.get(len(shown := targets(setting)), "over all targets").format(shown[0])
    return (
        f"Stability along training: {setting.words}\n"
        f"Means over seeds; bands and bars: {setting.interval}, on scales that end where accuracies and deviations do. "
        "Accuracy on the held-out domain: in split; on source domains: "
        f"{'test split' if setting.test_share else 'out split, also used for selection'}. Right: from step "
        f"{setting.switch_step} on, {over}. The first evaluations lie below the axes."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw the curves of each target, and the numbers beside them."""
    shown = frame[frame["over"] == "seeds"]
    return stability.picture(shown, list(dict.fromkeys(shown["method"])), caption)


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
)
