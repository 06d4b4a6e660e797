"""Bit widths as radii: rounding noise compared with random directions of the same norm (no figure of QT-DoG).

The paper treats quantization noise as a random step that finds flat minima. Around the latent weights of each run the
loss is evaluated at the rounded weights, at 8 to 2 bits, and along random directions under two nulls: of the same norm
overall, and of the same norm in each channel. The norm of the noise is its radius in Figure 3.
"""

from typing import TYPE_CHECKING, Any

import pandas as pd

from flatlab.analysis import Analysis, by_method, crossed, from_table
from flatlab.report import rounding, tables, verdicts
from flatlab.report.panels import SOURCE, TITLES
from flatlab.specs.measurements import RoundingSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "ERM"
ORDER = ("ERM", "QT-DoG")
labelled = by_method(ORDER)
IMAGES, DIRECTIONS = 64, 48  # of each domain; of each perturbation, which gives the standard deviation to 10 %
LAYER_BITS = (4,)
MOST = 5  # layers that are listed
SUMMARY = "Rise by rounding in standard deviations above random directions (z), source domains, means over held-out "
SUMMARY += "domains and seeds; 95 % intervals over seeds, each alone; * p < 0.05 after Holm over the lines of a column"


def measurement(setting: Setting) -> RoundingSpec:
    """Return the measurement of each run."""
    directions = setting.num_samples or DIRECTIONS
    return RoundingSpec.make(
        images=setting.images or IMAGES,
        num_samples=directions,
        layer_bits=LAYER_BITS,
        granularity=setting.granularity,
    )


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return the rises of each run with intervals over directions, and of each method over seeds."""
    return rounding.with_seeds(
        rounding.rises(store, [(name, run, measurement(setting)) for name, run in labelled(setting)])
    )


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over seeds; `z` and the difference of the methods with verdicts.

    Families: for each panel and null, z of all networks and bit widths; for each panel, the differences at all widths.
    """
    each = frame[(frame["over"] == "directions") & (frame["part"] == "all")]
    z = tables.against_zero(each[each["quantity"] == "z"], rounding.KEYS).assign(baseline="random directions")
    known = z["p"].notna() | bool(z["p"].isna().all())
    z = verdicts.corrected(z, "z, " + z["null"].map(rounding.LOOKS) + ", " + z["panel"].map(TITLES), read=known)
    rise = each[(each["quantity"] == "rise") & (each["null"] == "channel") & (each["perturbation"] != "trained")]
    less = tables.paired(rise, BASELINE, ["panel", "perturbation"]).assign(quantity="difference")
    less = verdicts.corrected(less, "Rise by rounding, " + less["panel"].map(TITLES))
    both = pd.concat([z, less], ignore_index=True)
    return both.assign(at=both["perturbation"].replace("trained", "its own") + " bits")


def _whole(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[(frame["over"] == "seeds") & (frame["panel"] == SOURCE)]


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Return a line for each method and bit width: z under the two nulls side by side."""
    z = findings[(findings["quantity"] == "z") & (findings["panel"] == SOURCE)]
    z = z.assign(cell=verdicts.cells(z))
    rows = []
    for (method, bits), cells in z.groupby(["method", "perturbation"], sort=False):
        row: dict[str, Any] = {"method": method, "bits": str(bits)}
        rows.append({**row, **{f"z {null}": cell for null, cell in zip(cells["null"], cells["cell"], strict=True)}})
    return pd.DataFrame(rows)


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return sentences on the rises of the loss, and on the tests."""
    found = findings(frame)
    z, less = found[found["quantity"] == "z"], found[found["quantity"] == "difference"]
    sentences = [*_rises(_whole(frame)), *_layer_by_layer(_whole(frame)), *verdicts.sentences(z)]
    sentences += [verdicts.statement(z, name="Tests of z", test="t tests over seeds"), *verdicts.sentences(less)]
    return [*sentences, verdicts.statement(less, name="Tests of the rise")]


def _rises(whole: pd.DataFrame) -> list[str]:
    """Return a sentence on the rises at each bit width and along random directions, for each method."""
    sentences = []
    for method, mine in whole[whole["part"] == "all"].groupby("method", sort=False):
        widths = []
        for bits, cells in mine.groupby("perturbation", sort=False):
            at = cells.set_index(["null", "quantity"])["value"]
            random = " and ".join(f"{at[null, 'random']:.4f} ({null})" for null in rounding.LOOKS)
            length = f"γ {cells['gamma'].iloc[0]:.2f}, {cells['share'].iloc[0]:.1%} of the norm"
            widths.append(f"{bits} ({length}): {at['channel', 'rise']:+.4f}, random {random}")
        sentences.append(f"{method!s}, rise in nats by bits (trained: its own quantizer): {'; '.join(widths)}.")
    return sentences


def _layer_by_layer(found: pd.DataFrame) -> list[str]:
    """Return a sentence on the rises if one layer is rounded, for the layers with the largest ones."""
    sentences = []
    alone = found[(found["part"] != "all") & (found["null"] == "channel")]
    for (method, bits), rows in alone.groupby(["method", "perturbation"], sort=False):
        cells = rows.pivot(index=["part", "gamma"], columns="quantity", values="value").reset_index()
        most = cells.sort_values("rise", ascending=False).head(MOST).to_dict("records")
        layers = [
            f"{c['part']} γ {c['gamma']:.2f}, {c['rise']:+.4f} (random {c['random']:.4f}, z {c['z']:+.1f})"
            for c in most
        ]
        sentences.append(
            f"{method!s}, one layer rounded, {bits} (bits; trained: its own quantizer): {'; '.join(layers)} nats."
        )
    return sentences


def caption(setting: Setting) -> str:
    """Return title and notes: data, seeds, directions."""
    chosen = measurement(setting)
    return (
        f"Bit widths as radii: {setting.words}\n"
        f"Source domains, {chosen.images} images of each; {chosen.num_samples} random directions beside each width. "
        f"Means over held-out domains; bars and bands: {setting.interval}. Grey: 95 % of random directions. "
        "own: the run's own quantizer."
    )


def draw(frame: pd.DataFrame, caption: str) -> "Figure":
    """Draw for each method the rises over the radius, and z of the noise."""
    return rounding.draw(frame[frame["over"] == "seeds"], caption)


FIGURE = Analysis(
    __name__,
    __doc__,
    BASELINE,
    labelled=labelled,
    measured=lambda setting: crossed(labelled(setting), [measurement(setting)]),
    table=table,
    findings=findings,
    summary=summary,
    summary_title=SUMMARY,
    remarks=remarks,
    caption=caption,
    draw=from_table(draw),
)
