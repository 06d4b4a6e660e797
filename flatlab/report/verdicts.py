"""From tests to sentences, by one rule for every page: a verdict is a p-value below 5 % after Holm within its family.

A finding is a row with `method`, `baseline`, `value` (their difference), `low`, `high` and `p`, those of this test
alone. `corrected` adds the family and the verdict, `sentences` and `statement` put it into words. Torch-free.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from flatlab.results.verdicts import holm

LEVEL = 0.05
MOST_DIGITS = 6
NONE, UNREAD = "not distinguishable", "not read"


def corrected(
    findings: pd.DataFrame, family: "pd.Series[str]", *, read: "pd.Series[bool] | None" = None
) -> pd.DataFrame:
    """Return the findings with `family`, `family_size`, `correction`, `p_holm`, and the `verdict` that follows.

    Args:
        findings: rows with `value` and `p`.
        family: of each row, its name.
        read: which rows are tested; the others get no verdict and count in no family. None: all.
    """
    tested = pd.Series(True, findings.index) if read is None else read
    found = findings.assign(family=family, family_size=0, correction="Holm", p_holm=np.nan)
    for _, rows in found[tested].groupby("family", sort=False):
        found.loc[rows.index, "family_size"] = len(rows)
        found.loc[rows.index, "p_holm"] = holm(rows["p"])
    sure = found["p_holm"] < LEVEL
    cases = [~tested, sure & (found["value"] < 0), sure & (found["value"] > 0)]
    return found.assign(verdict=np.select(cases, [UNREAD, "lower", "higher"], default=NONE))


def bracketed(value: float, low: float, high: float, *, digits: int = 3, starred: bool = False) -> str:
    """Return "value [low, high]", perhaps with a star after the value; without a spread over seeds without interval.

    Behind the bracket, stars of one line of markdown would be read as emphasis.
    """
    if not np.isfinite([low, high]).all():
        return f"{value:+.{digits}f} (no interval)"
    excluding = low * high > 0
    while excluding and digits < MOST_DIGITS and 0 in (round(low, digits), round(high, digits)):
        digits += 1  # an interval without 0 does not end at 0.00
    return f"{value:+.{digits}f}{'*' if starred else ''} [{low:+.{digits}f}, {high:+.{digits}f}]"


def cells(findings: pd.DataFrame, *, digits: int | Sequence[int] = 3) -> list[str]:
    """Return each finding with its interval as text, starred where p < 0.05 after Holm within its family.

    Args:
        findings: as `corrected` returns them.
        digits: decimals of all values, or of each.
    """
    rows = findings[["p_holm", "value", "low", "high"]].itertuples(index=False)
    places = [digits] * len(findings) if isinstance(digits, int) else digits
    return [bracketed(*each, digits=n, starred=p < LEVEL) for n, (p, *each) in zip(places, rows, strict=True)]


def by_measure(findings: pd.DataFrame, titles: Mapping[str, str], index: list[str]) -> pd.DataFrame:
    """Return a line for each pair of methods, and a column for each measure.

    Args:
        findings: as `corrected` returns them, with `measure`.
        titles: of the measures, in the order of the columns.
        index: the columns that distinguish lines; `pair` is that of "method less baseline".
    """
    names = findings["measure"].map(titles)
    pair, shown = findings["method"] + " less " + findings["baseline"], cells(findings, digits=digits_of(names))
    named = findings.assign(pair=pair, cell=shown, measure=names)
    wide = named.pivot_table(index=index, columns="measure", values="cell", aggfunc="first", sort=False).fillna("")
    return wide[[name for name in titles.values() if name in wide]].reset_index()


def digits_of(titles: Iterable[str]) -> list[int]:
    """Return the number of decimals of values by the unit in their titles: 3 for nats, 2 for points."""
    return [3 if title.endswith("(nats)") else 2 for title in titles]


def sentences(
    findings: pd.DataFrame,
    *,
    words: tuple[str, str] = ("lower", "higher"),
    unit: str = "",
    digits: int = 3,
    place: str = "at",
) -> list[str]:
    """Return a sentence for each family: which differences are significant, and for how many pairs none is.

    Args:
        findings: as `corrected` returns them; where a family tests a pair at several places, `at` names these.
        words: for a method with a lower value, and with a higher one.
        unit: of the values.
        digits: decimals of the values.
        place: word before the names in `at`.
    """
    lines = []
    for family, rows in findings.groupby("family", sort=False):
        tests = rows[rows["verdict"] != UNREAD]
        if tests.empty:
            lines.append(f"{family}: no test was made.")
        elif tests["p"].isna().all():
            lines.append(f"{family}: without a spread over seeds there is no test, and no difference is established.")
        else:
            lines.append(f"{family}: {'; '.join(_clauses(tests, words, (unit, digits, place)))}.")
    return lines


def _clauses(tests: pd.DataFrame, words: tuple[str, str], form: tuple[str, int, str]) -> list[str]:
    unit, digits, place = form
    named = dict(zip(("lower", "higher"), words, strict=True))
    pairs, sure = ["method", "baseline"], tests[tests["verdict"] != NONE]
    clauses = []
    for (method, baseline, verdict), rows in sure.groupby([*pairs, "verdict"], sort=False):
        if "at" in rows:
            how = f"{place} {', '.join(rows['at'])}"
        else:
            *interval, p = rows[["value", "low", "high", "p_holm"]].iloc[0]
            how = f"({bracketed(*interval, digits=digits)}{unit and f' {unit}'}, p = {p:.2g})"
        clauses.append(f"{method} is {named[str(verdict)]} than {baseline} {how}")
    count, left = len(tests[pairs].drop_duplicates()), len(sure[pairs].drop_duplicates())
    if left == count:
        return clauses
    others = f"{'other ' if left else ''}{f'{count - left} pairs' if count - left > 1 else 'pair'}"
    return [*clauses, f"no difference is established for the {others}"]


def statement(findings: pd.DataFrame, *, name: str = "Tests", test: str = "paired t tests over seeds") -> str:
    """Return a sentence on the tests, their correction, and the number of false verdicts to expect by chance.

    Args:
        findings: as `corrected` returns them.
        name: of the tests, if a page has several kinds.
        test: the kind of test.
    """
    tests = findings[findings["verdict"] != UNREAD]
    known = tests[tests["p"].notna()]
    if known.empty:
        return f"{name}: none, so that there is no verdict."
    sizes = tests.groupby("family", sort=False).size()
    excluding = int((known["low"] * known["high"] > 0).sum())
    return (
        f"{name}: {_counted(sizes.tolist())}, {test}, corrected by Holm's method within each family: were there no "
        f"difference at all, a family would hold a false verdict with a probability of at most {LEVEL:.0%}, which is "
        f"{LEVEL * len(sizes):.2g} of {len(sizes)}. Intervals are of each difference alone, {1 - LEVEL:.0%}: "
        f"{excluding} of {len(known)} exclude zero, {LEVEL * len(known):.2g} would by chance."
        + f" {len(tests) - len(known)} tests could not be made: no spread over seeds."
        * (len(tests) > len(known))
    )


def _counted(counts: list[int]) -> str:
    span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{len(counts)} {'family' if len(counts) == 1 else 'families'} of {span} tests"
