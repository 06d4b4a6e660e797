"""The paper's claims, each with the tests that decide it, and the number of seeds that would decide more. Torch-free.

The rule: a claim is supported if at least one test of its family has a verdict in its direction and none has one in
the other; contradicted if it is the other way round; else it "cannot be told at this size", as PROTOCOL.md words it.
"""

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from flatlab.arguments import FloatArray
from flatlab.report import tables, verdicts

FLATNESS = ("source, none", "source, filter", "target, none", "target, filter")
POWER = 0.8
MOST_SEEDS = 10_000
SUPPORTED, CONTRADICTED, MIXED, UNKNOWN = (
    "supported",
    "contradicted",
    "supported in part and contradicted in part",
    "cannot be told at this size",
)
EFFECTS: Mapping[str, tuple[float, str]] = {  # the smallest of interest; for flatness as a share of ERM's
    "test": (1.0, "points"),
    "validation": (1.0, "points"),
    "target": (1.0, "points"),  # the paper reports about two on PACS
    "spread": (0.5, "points"),
    "change": (0.5, "points"),
    **dict.fromkeys(FLATNESS, (0.1, "share")),
}


ENOUGH = (
    "Seeds would tell: the fewest with which the 95 % interval of a test, at its spread over the seeds here, is at "
    "most half as wide as the smallest effect of interest (1 point of accuracy, 0.5 points of stability, 10 % of ERM's "
    "mean of F); from the least to the most of the claim's tests, of which one suffices to support it."
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, or the positive control.

    Attributes:
        words: the claim.
        measures: compared measures.
        pairs: method and baseline.
        verdict: "lower" or "higher", that of the method.
        note: limits of the tests.
    """

    words: str
    measures: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    verdict: str
    note: str = ""

    def holds(self, row: Mapping[Hashable, Any]) -> bool:
        """Return whether a finding is one of the claim's tests."""
        return row["measure"] in self.measures and (row["method"], row["baseline"]) in self.pairs


CLAIMS = (
    Claim(
        "strong SAM is flatter than ERM (positive control: what the tests can see)",
        FLATNESS,
        (("strong SAM", "ERM"),),
        "lower",
    ),
    Claim("QT-DoG is flatter than ERM", FLATNESS, (("QT-DoG", "ERM"),), "lower"),
    Claim("QT-DoG is flatter than SAM and SWA", FLATNESS, (("QT-DoG", "SAM"), ("QT-DoG", "SWA")), "lower"),
    Claim("QT-DoG is steadier than ERM after the switch", ("spread", "change"), (("QT-DoG", "ERM"),), "lower"),
    Claim("QT-DoG is better than ERM out of domain", ("target",), (("QT-DoG", "ERM"),), "higher"),
    Claim(
        "7 bits are best",
        ("target",),
        (("QT-DoG", "QT-DoG 4 bits"),),
        "higher",
        " Compared with 4 bits alone: the other widths are not trained here.",
    ),
)


def claim_of(row: Mapping[Hashable, Any]) -> str:
    """Return the claim that a finding tests; an empty string if there is none."""
    return next((claim.words for claim in CLAIMS if claim.holds(row)), "")


def verdict_of(claim: Claim, tests: pd.DataFrame) -> str:
    """Return the verdict on a claim by its tests."""
    decided = set(tests["verdict"]) - {verdicts.NONE, verdicts.UNREAD}
    return {(True, False): SUPPORTED, (False, True): CONTRADICTED, (True, True): MIXED}.get(
        (claim.verdict in decided, bool(decided - {claim.verdict})), UNKNOWN
    )


def sentences(findings: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each claim: the verdict, the tests with intervals, and, if undecided, how many seeds would tell.

    Args:
        findings: with verdicts, `seeds`, `targets` and `seeds_needed`.
        names: of the measures.
    """
    for claim in CLAIMS:
        mine = findings[[claim.holds(row) for row in findings.to_dict("records")]]
        parts = [f"{which}: {_sentence(claim, rows, names)}" for which, rows in mine.groupby("targets", sort=False)]
        made = set(zip(mine["method"], mine["baseline"], strict=True))
        lacking = [f"{method} less {base}" for method, base in claim.pairs if parts and (method, base) not in made]
        left = f" Not measured: {', '.join(lacking)}." if lacking else ""
        yield f"{claim.words}. {' '.join(parts) or 'No measurement decides this.'}{left}{claim.note if parts else ''}"


def brief(findings: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    """Yield a short sentence for each claim that is tested: the verdict, the count of verdicts, the range of values.

    Args:
        findings: with verdicts, `seeds` and `targets`, of which the first is shown, and others with another verdict.
        names: of the measures; those of one claim have the same unit.
    """
    for claim in CLAIMS:
        mine = findings[[claim.holds(row) for row in findings.to_dict("records")]]
        parts = {str(which): rows for which, rows in mine.groupby("targets", sort=False)}
        if not parts:
            continue
        (first, rows), *others = parts.items()
        verdict, seeds = verdict_of(claim, rows), int(rows["seeds"].max())
        unlike = {which: found for which, each in others if (found := verdict_of(claim, each)) != verdict}
        ends = [f"{value:+.3f}" for value in sorted({rows["value"].min(), rows["value"].max()})]
        unit = names[rows["measure"].iloc[0]].rpartition("(")[2].rstrip(")")
        sides = {"lower": "higher", "higher": "lower"}
        sure, against = (int((rows["verdict"] == each).sum()) for each in (claim.verdict, sides[claim.verdict]))
        tests = f"{len(rows)} {'test' if len(rows) == 1 else 'tests'}, {sure} for it and {against} against it"
        yield (
            f"{claim.words}: **{verdict}** ({first}, {seeds} {'seed' if seeds == 1 else 'seeds'}; "
            f"{tests if rows['p'].notna().any() else 'no test'}; "
            f"{'difference' if len(ends) == 1 else 'differences from'} {' to '.join(ends)} {unit})"
            f"{''.join(f'; {which}: **{found}**' for which, found in unlike.items())}."
        )


def _sentence(claim: Claim, rows: pd.DataFrame, names: Mapping[str, str]) -> str:
    """Return the verdict with each test in brackets."""
    several = len(claim.pairs) > 1
    tests = [
        f"{names[row['measure']]}{' less ' + row['baseline'] if several else ''} "
        f"{verdicts.bracketed(row['value'], row['low'], row['high'], starred=row['p_holm'] < verdicts.LEVEL)}"
        for row in rows.to_dict("records")
    ]
    verdict, seeds, needed = verdict_of(claim, rows), int(rows["seeds"].max()), rows["seeds_needed"]
    counts = [f"{count:,.0f}" for count in sorted({needed.min(), needed.max()})]
    what = f"; {' to '.join(counts)} seeds would tell" if verdict == UNKNOWN and np.isfinite(needed).all() else ""
    return f"**{verdict}** ({seeds} {'seed' if seeds == 1 else 'seeds'}; {', '.join(tests)}{what})."


def powered(findings: pd.DataFrame, base: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    """Return the findings with `effect`, `seeds_needed` and `detectable`, in the units of the values.

    Args:
        findings: rows with `measure`, `targets`, `stderr` and `seeds`.
        base: mean of ERM by targets and measure, of which some effects are shares.
    """
    effects = []
    for measure, targets in findings[["measure", "targets"]].itertuples(index=False):
        size, unit = EFFECTS.get(measure, (float("nan"), ""))
        effects.append(size * abs(base[targets, measure]) if unit == "share" else size)
    spread = findings["stderr"] * np.sqrt(findings["seeds"])
    return findings.assign(
        effect=effects,
        seeds_needed=[seeds_needed(s, e) for s, e in zip(spread, effects, strict=True)],
        detectable=[detectable(s, int(n)) for s, n in zip(spread, findings["seeds"], strict=True)],
    )


def seeds_needed(spread: float, effect: float) -> float:
    """Return the fewest seeds whose 95 % interval is at most half as wide as an effect; NaN if either is unknown.

    Args:
        spread: standard deviation of the paired differences over seeds.
        effect: the smallest of interest.
    """
    if not (np.isfinite(spread) and effect > 0):
        return float("nan")
    enough = np.flatnonzero(_widths() * spread <= effect / 2)
    return float(2 + enough[0]) if len(enough) else float("inf")


@cache
def _widths() -> FloatArray:
    """Return the widths of 95 % intervals of 2, 3, ... seeds, in standard deviations over seeds."""
    counts = np.arange(2, MOST_SEEDS + 1)
    return np.asarray(2 * stats.t.ppf((1 + tables.LEVEL) / 2, counts - 1) / np.sqrt(counts))


def detectable(spread: float, seeds: int) -> float:
    """Return the smallest true difference that a single test at 5 % detects with 80 % power.

    Args:
        spread: standard deviation s of the paired differences over seeds.
        seeds: n, at least 2; one seed gives no test (NaN).
    """
    if seeds < 2:
        return float("nan")
    return _detectable(seeds) * spread


@cache
def _detectable(seeds: int) -> float:
    """Return it in standard deviations, from the test statistic's noncentral t; a verdict has the right sign."""
    critical = float(stats.t.ppf((1 + tables.LEVEL) / 2, seeds - 1))
    shift = optimize.brentq(lambda d: float(stats.nct.sf(critical, seeds - 1, d)) - POWER, 0, 2 * critical)
    return float(shift) / math.sqrt(seeds)
