"""QGen: are networks of fewer bits flatter, and is flatness correlated with generalization gaps? (arXiv 2404.11769).

FOUND (abstract and paper page; there is no public code): rounding acts as noise that penalizes curvature, more so with
fewer bits; some 2,000 networks; smaller gaps with fewer bits at a higher training loss; less damage by corruptions.
REVIEW: nothing here rests on reviews. INFERRED: the grid, the data, the switch from full precision to bits after 10 %
of the steps, the stop at a common cross-entropy, the list of measures (those of arXiv 1912.02178 and 2010.11924), and
the tests. Unlike those, BatchNorm is not folded, and all parameters are moved.
"""

from typing import Any

import numpy as np
import pandas as pd

from analyses import _kendall, _qgen_grid
from analyses._qgen_draw import draw
from analyses._qgen_grid import MULTIPLES, TARGET, grid, labelled, name_of, planned
from analyses._qgen_tests import BASELINE, GAPS, MEASURES, findings
from flatlab.analysis import Analysis, from_table
from flatlab.report import verdicts
from flatlab.report.panels import SOURCE, part_of
from flatlab.specs.corruption import under
from flatlab.specs.measurement import MeasurementSpec
from flatlab.specs.run import RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import Run, RunStore

SUMMARY = "Kendall's tau-b of each measure with each gap; 95 % intervals by bootstrap over trajectories, each alone; "
SUMMARY += "* p < 0.05 after Benjamini and Hochberg over the lines of a column"
SHEET = "Networks by bits, at the end of training; means, accuracies in percent"


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return a row for each network: its options, fit, gaps, measures, and accuracies on corrupted images."""
    return pd.DataFrame([_row(store.run(run), bits, specs) for bits, run, specs in planned(setting)])


def _row(run: Run, bits: int, specs: dict[str, MeasurementSpec]) -> dict[str, Any]:
    spec = run.spec
    last = run.rows()[-1]
    fitted, tested = (_scores(last[part].values()) for part in ("fitted", "test"))
    out = _scores(last["target"].values(), weighed=True)
    return {
        "method": name_of(bits),
        "bits": bits,
        **{name: getattr(spec, name) for name in ("model", "lr", "weight_decay", "batch_size", "held_out", "seed")},
        "step": last["step"],
        "reached": fitted["loss"] <= TARGET,
        "train loss": fitted["loss"],
        "train accuracy": fitted["accuracy"],
        "test accuracy": tested["accuracy"],
        "target accuracy": out["accuracy"],
        "gap in": tested["loss"] - fitted["loss"],
        "gap out": out["loss"] - fitted["loss"],
        "accuracy gap in": fitted["accuracy"] - tested["accuracy"],
        "accuracy gap out": fitted["accuracy"] - out["accuracy"],
        **_measures(run, specs),
    }


def _scores(parts: Any, *, weighed: bool = False) -> dict[str, float]:
    """Return mean accuracy and loss of domains, or of the parts of one domain, weighted by their images."""
    rows = list(parts)
    weights = [part["n"] if weighed else 1 for part in rows]
    return {name: float(np.average([part[name] for part in rows], weights=weights)) for name in ("accuracy", "loss")}


def _measures(run: Run, specs: dict[str, MeasurementSpec]) -> dict[str, float]:
    others, curvature = run.result(specs["others"]), run.result(specs["curvature"])
    values = others.values
    found = {name: _rises(run, specs[name])[-1] for name in ("raw", "filter")}
    found |= {"trace": curvature.numbers["trace"].value, "eigenvalue": float(curvature.eigenvalues[0])}
    found |= {name: values[name] for name in ("sharpness", "pac_bayes", "magnitude_aware", "distance", "penalty")}
    found |= {"flat": _inverse(values["sigma"]), "aware flat": _inverse(values["relative_sigma"])}
    found["negative margin"] = -values["margin"]
    for name in specs:
        if name.startswith("noise"):
            found |= {f"{name} x {k:g}": rise for k, rise in zip(MULTIPLES, _rises(run, specs[name]), strict=True)}
    for name, accuracies in zip(others.corruptions, others.accuracies, strict=True):
        found |= {f"{name}:{1 + level}": float(accuracy) for level, accuracy in enumerate(accuracies)}
    return found


def _inverse(sigma: float) -> float:
    return sigma**-2 if sigma > 0 else float("inf")


def _rises(run: Run, spec: MeasurementSpec) -> list[float]:
    """Return F on the source domains at each radius above zero."""
    whole = part_of(run.result(spec), SOURCE, run.spec.held_out)
    return [found.value for radius, found in zip(whole.radii, whole.estimates, strict=True) if radius > 0]


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each measure and gap: tau over all pairs and over pairs of equal bits; also without misses."""
    mine = findings[(findings["quantity"] == "tau") & findings["among"].isin((_kendall.ALL, _kendall.EQUAL))]
    columns = mine["among"] + mine["reached"].map({False: "", True: ", target reached"})
    cells = mine.assign(
        measure=mine["measure"].map(MEASURES),
        gap=mine["gap"].map(GAPS),
        column=columns,
        cell=[
            verdicts.bracketed(value, low, high, digits=2, starred=p < verdicts.LEVEL)
            for value, low, high, p in mine[["value", "low", "high", "p_bh"]].itertuples(index=False)
        ],
    )
    wide = cells.pivot_table(index=["measure", "gap"], columns="column", values="cell", aggfunc="first", sort=False)
    return wide.fillna("").reset_index()


def sheet(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each bit width: number of networks that reach the target, losses, accuracies and gaps."""
    each = frame.groupby("method", sort=False)
    percent = {"train accuracy": "training", "test accuracy": "in domain", "target accuracy": "out of domain"}
    found = each[["train loss", "gap in", "gap out"]].mean()
    found = found.rename(columns={"gap in": "loss gap in domain", "gap out": "loss gap out of domain"})
    accuracies = 100 * each[list(percent)].mean().rename(columns=percent)
    counts = pd.DataFrame({"networks": each.size(), "reach the target": each["reached"].sum()})
    return pd.concat([counts, found, accuracies], axis=1).reset_index()


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the number of networks, the tests of flatness, and the correlations with the gaps."""
    found = findings(frame)
    differ, tau = found[found["quantity"] != "tau"], found[found["quantity"] == "tau"].astype({"reached": bool})
    flat = differ[differ["quantity"] != "corrupted"]
    words: dict[str, Any] = {"words": ("flatter", "sharper"), "unit": "nats", "digits": 4}
    lines = [_counts(frame), *verdicts.sentences(flat, **words)]
    lines += verdicts.sentences(differ[differ["quantity"] == "corrupted"], words=("less accurate", "more accurate"))
    lines.append(verdicts.statement(differ, test="paired t tests over trajectories"))
    lines += [_correlated(tau[(tau["among"] == among) & ~tau["reached"]], among) for among in tau["among"].unique()]
    return [*lines, _without_misses(tau), *PROVENANCE]


PROVENANCE = (
    "FOUND in the paper (its abstract and public page): rounding as noise whose penalty grows with the step, some "
    "2,000 networks, smaller gaps at fewer bits, less damage by corruptions. REVIEW: nothing. INFERRED: grid, data, "
    "switch, common cross-entropy, measures and tests. BatchNorm is not folded, and noise moves all parameters.",
)


def _counts(frame: pd.DataFrame) -> str:
    missed = frame[~frame["reached"]].groupby("method", sort=False).size()
    listed = ", ".join(f"{count} of {name}" for name, count in missed.items())
    return (
        f"{len(frame)} networks of {frame['seed'].nunique()} trajectories; those of a trajectory differ in their bits "
        f"and share the training up to the switch. {int(frame['reached'].sum())} reach a cross-entropy of {TARGET:g} "
        f"nats on the training images within the limit of steps; {int(missed.sum())} do "
        f"not{f' ({listed})' * bool(listed)}."
    )


def _correlated(tau: pd.DataFrame, among: str) -> str:
    """Return a sentence on the measures that are correlated with each gap."""
    if tau["p"].isna().all():
        return f"Kendall's tau, {among}: no test was made, since the trajectories are too few for an interval."
    found = []
    for gap in GAPS:
        mine = tau[(tau["gap"] == gap) & (tau["p_bh"] < verdicts.LEVEL)]
        sure = [f"{MEASURES[name]} {value:+.2f}" for name, value in mine[["measure", "value"]].itertuples(index=False)]
        found.append(f"{GAPS[gap]}: {', '.join(sure) or 'none'}")
    return (
        f"Kendall's tau, {among}, distinguishable from 0 (p < {verdicts.LEVEL} after Benjamini and Hochberg over "
        f"{int(tau['p'].notna().sum())} taus): {'; '.join(found)}."
    )


def _without_misses(tau: pd.DataFrame) -> str:
    """Return a sentence on the verdicts that change without the networks that miss the target."""
    keys = ["measure", "gap", "among"]
    mine = tau[tau["among"].isin((_kendall.ALL, _kendall.EQUAL))]
    sides = [mine[mine["reached"] == reached].set_index(keys) for reached in (False, True)]
    if sides[1].empty:
        return "No network reaches the target, so that no tau is given without those that miss it."
    sure = [np.sign(side["value"]).where(side["p_bh"] < verdicts.LEVEL, 0) for side in sides]
    changed = int((sure[0] != sure[1].reindex(sure[0].index)).sum())
    return (
        f"Of {len(sure[0])} taus (all pairs, equal bits), those whose verdict changes without the networks that miss "
        f"the target: {changed}."
    )


def caption(setting: Setting) -> str:
    """Return title and notes: networks, intervals."""
    axes, own = grid(setting), _qgen_grid.trained(setting)
    count = len(labelled(setting))
    return (
        f"Bits, flatness and generalization gaps: {count} networks, {setting.dataset}\n"
        f"{', '.join(axes.models)}; {setting.held_out[-1]}{under(setting.corruption)} held out. Trained to {TARGET:g} "
        f"nats or {own.steps:,} steps, bits from step {own.switch_step} on. Taus: bars are 95 % intervals by bootstrap "
        "over trajectories, filled where p < 0.05 after Benjamini and Hochberg. F over the distance in units of the "
        "network's quantization noise; dashed: full precision, in units of its rounding noise at as many bits. Bands: "
        "95 % intervals over trajectories; one that extends to the lower edge includes 0."
    )


def measured(setting: Setting) -> list[tuple[RunSpec, MeasurementSpec]]:
    """Return each network with each of its measurements."""
    return [(run, spec) for _, run, specs in planned(setting) for spec in specs.values()]


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    measured=measured,
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
    sheet=sheet,
    sheet_title=SHEET,
    alone=True,
)
