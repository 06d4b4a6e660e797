"""The tests of `qgen`: quantized networks less those of full precision, and Kendall's tau of measures and gaps.

Torch-free; of the frame of `qgen`, a row for each network.
"""

import pandas as pd

from analyses import _kendall
from analyses._qgen_grid import FULL, name_of
from flatlab.report import tables, verdicts
from flatlab.specs.generalisation import SEVERITIES

BASELINE = name_of(FULL)
GAPS = {
    "gap in": "in domain, loss",
    "gap out": "out of domain, loss",
    "accuracy gap in": "in domain, accuracy",
    "accuracy gap out": "out of domain, accuracy",
}
MEASURES = {  # by hypothesis, a larger value means a larger gap
    "raw": "F at matched rise, raw",
    "filter": "F at matched rise, filter-normalised",
    "trace": "trace of the Hessian",
    "eigenvalue": "top eigenvalue",
    "sharpness": "adaptive sharpness, worst case",
    "flat": "PAC-Bayes 1/σ²",
    "aware flat": "PAC-Bayes 1/σ′², magnitude-aware",
    "pac_bayes": "PAC-Bayes bound",
    "magnitude_aware": "PAC-Bayes bound, magnitude-aware",
    "distance": "distance from initialisation",
    "negative margin": "negative margin",
    "penalty": "penalty of rounding",
}
QUESTIONS = {  # quantity -> the family of its tests
    "raw": "Raw flatness (F at the radius where the reference network rises by 0.5 nats)",
    "filter": "Filter-normalised flatness (at the share of the norms where the reference network rises by 0.5 nats)",
    "noise": "Noise-normalised flatness (F at the distance of each network's own quantization noise, that of rounding "
    "to as many bits where it has none)",
    "corrupted": "Accuracy on corrupted images of the source domains (points)",
}


def corrupted(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mean accuracy (points) over the corruptions, a row for each network and severity."""
    names = [name.rpartition(":") for name in map(str, frame) if ":" in name]
    rows = []
    for severity in range(1, 1 + SEVERITIES):
        mine = [f"{name}:{level}" for name, _, level in names if int(level) == severity]
        rows.append(frame[["method", "held_out", "seed"]].assign(at=severity, value=100 * frame[mine].mean(axis=1)))
    return pd.concat(rows, ignore_index=True)


def findings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of quantized networks to those of full precision, and Kendall's tau of measures and gaps.

    `quantity` is that of a difference, or "tau"; differences are paired by trajectory, and corrected by Holm's method.
    """
    return pd.concat([differences(frame), correlations(frame)], ignore_index=True)


def differences(frame: pd.DataFrame) -> pd.DataFrame:
    """Return quantized networks less those of full precision in flatness and in accuracy on corrupted images."""
    keys = ["method", "held_out", "seed"]
    parts = [frame[keys].assign(value=frame[name], quantity=name) for name in ("raw", "filter")]
    over = corrupted(frame).groupby(keys, sort=False)["value"].mean().reset_index()
    parts.append(over.assign(quantity="corrupted"))
    found = tables.paired(pd.concat(parts, ignore_index=True), BASELINE, ["quantity"])
    noise = [_noise(frame, bits) for bits in sorted(set(frame["bits"]) - {FULL})]
    found = pd.concat([found, *noise], ignore_index=True)
    found["quantity"] = pd.Categorical(found["quantity"], list(QUESTIONS))
    found = found.sort_values("quantity", kind="stable", ignore_index=True).astype({"quantity": str})
    return verdicts.corrected(found, found["quantity"].map(QUESTIONS))


def _noise(frame: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Return F at one unit of noise of the networks of some bits, less that of full precision at its rounding noise."""
    both = frame[frame["bits"].isin((bits, FULL))]
    rises = both[["method", "held_out", "seed"]].assign(value=both[f"noise {bits} x 1"], quantity="noise")
    return tables.paired(rises, BASELINE, ["quantity"])


def correlations(frame: pd.DataFrame) -> pd.DataFrame:
    """Return tau-b of each measure with each gap; with `reached` only of networks that reach the target."""
    pairs = [(measure, gap) for measure in MEASURES for gap in GAPS]
    found = []
    for reached, mine in ((False, frame), (True, frame[frame["reached"]])):
        if len(mine):
            each = _kendall.taus(mine, pairs, stratum="method", group="seed")
            found.append(each.assign(reached=reached))
    return pd.concat(found, ignore_index=True).assign(quantity="tau")
