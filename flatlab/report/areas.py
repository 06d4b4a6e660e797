"""The range of radii over which the rise of the loss is read, and the area under it: up to ERM's rise of 0.5 nats.

Torch-free. The frames are those of `tables.flatness`: a row for each run, panel and radius.
"""

import numpy as np
import pandas as pd

from flatlab.report.panels import SOURCE

UP_TO = 0.5  # nats: rise of the baseline on the source domains at which the area ends
WHERE = ["panel", "normalisation"]
RUN = [*WHERE, "method", "held_out", "seed"]


def named_by_rise(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return the frame with `rise` filled where radii were given: the baseline's on the source domains there.

    Args:
        frame: rows of runs.
        baseline: the method whose rise names a radius.
    """
    own = frame[(frame["method"] == baseline) & (frame["panel"] == SOURCE)]
    risen = own.groupby(["normalisation", "radius"])["value"].mean().rename("risen")
    joined = frame.join(risen, on=["normalisation", "radius"])
    return joined.assign(rise=joined["rise"].fillna(joined["risen"])).drop(columns="risen")


def limits(each: pd.DataFrame) -> pd.DataFrame:
    """Return for each panel and normalisation up to where the loss is read: a verdict needs a loss below chance.

    Columns: `limit`, the largest radius of at most 0.5 nats up to which no method's mean loss reaches chance (NaN:
    there is none); `met`, the first radius at which one does (NaN: none), and `by`, the methods that do.

    Args:
        each: rows of runs with `rise`, `base_loss` and `chance`.
    """
    loss = each.assign(loss=each["value"] + each["base_loss"])
    means = loss.groupby([*WHERE, "radius", "method"], sort=False)[["loss", "chance", "rise"]].mean().reset_index()
    means["reaches"] = ~(means["loss"] < means["chance"])  # a loss that is not finite does
    rows = []
    for keys, mine in means.groupby(WHERE, sort=False):
        met = float(mine.loc[mine["reaches"], "radius"].min())
        by = ", ".join(mine.loc[mine["reaches"] & (mine["radius"] == met), "method"])
        readable = mine[(mine["radius"] > 0) & (mine["rise"] <= UP_TO) & ~(mine["radius"] >= met)]
        found = {"limit": float(readable["radius"].max()), "met": met, "by": by, "chance": float(mine["chance"].max())}
        rows.append({**dict(zip(WHERE, keys, strict=True)), **found})
    return pd.DataFrame(rows)


def areas(each: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run and panel: the mean of F over the radii from 0 to the limit, by the trapezoidal rule.

    Args:
        each: rows of runs, radius 0 among them.
        ends: as `limits` returns them.
    """
    end = ends.set_index(WHERE)["limit"].to_dict()
    rows = []
    for keys, curve in each.groupby(RUN, sort=False):
        limit = float(end[keys[:2]])
        inside = curve[curve["radius"] <= limit].sort_values("radius")
        value = np.trapezoid(inside["value"], inside["radius"]) / limit if len(inside) else float("nan")
        rows.append({**dict(zip(RUN, keys, strict=True)), "value": float(value)})
    return pd.DataFrame(rows)


def areas_by_domain(each: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """Return `areas`, and further panels of the source domains: each by its name, `highest`, and `ratio`.

    `highest` is of the rise of the sharpest source domain at each radius; `ratio` that over the mean of the domains.

    Args:
        each: rows of runs, radius 0 among them, with `each_domain` and `highest` as `tables.flatness` returns them.
        ends: as `limits` returns them.
    """
    whole, source = areas(each, ends), each[each["panel"] == SOURCE]
    highest = areas(source.assign(value=source["highest"]), ends)
    joined = highest.merge(whole, on=RUN, suffixes=("", "_mean"))
    ratio = joined["value"] / joined["value_mean"].where(joined["value_mean"] > 0)
    parts = [whole, highest.assign(panel="highest"), joined[[*RUN, "value"]].assign(value=ratio, panel="ratio")]
    domains = source["each_domain"].str.findall(r"(?:^|; )(.+?) (\S+)(?=;|$)").explode()
    split = source.join(pd.DataFrame(domains.tolist(), domains.index, ["domain", "own"]))
    for domain, mine in split.groupby("domain", sort=False):
        parts.append(areas(mine.assign(value=mine["own"].astype(float)), ends).assign(panel=domain))
    return pd.concat(parts, ignore_index=True)
