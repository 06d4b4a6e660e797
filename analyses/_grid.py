"""Distance of trained convolutions from the 8-bit grid of some pretrained weights. Torch-free.

The shared ImageNet weights of MobileNetV2 are dequantized integers: each output channel consists of multiples of its
largest weight / 127, within 0.013 steps. Training moves them off it; before, rounding noise is not meaningful.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from flatlab import files
from flatlab.specs.methods import Labelled
from flatlab.store.runs import RunStore

LEVELS = 127  # of a signed 8-bit integer; symmetric, a step for each output channel
MEASURE = "distance from the 8-bit grid of the start (steps)"
UNIFORM = 0.25  # mean distance to the nearest level in steps, for weights without a grid
NAMES = {r"^features\.features\.": "features.", r"\.parametrizations\.(\w+)\.original$": r".\1"}


def distances(store: RunStore, wanted: list[Labelled]) -> pd.DataFrame:
    """Return a row for each run that started from a file: mean distance to the nearest level, in steps of the start.

    Args:
        store: contains the finished runs.
        wanted: method's name, run.
    """
    rows = []
    starts: dict[str, files.Arrays] = {}
    for method, spec in wanted:
        path = str(store.run(spec).provenance.get("weights_file"))
        if spec.weights == "none" or not path.endswith(".safetensors") or not Path(path).is_file():
            continue
        if path not in starts:
            starts[path] = load_file(path)
        trained = files.load_arrays(store.run(spec).checkpoint("selected"))[0]
        rows.append(
            {"method": method, "held_out": spec.held_out, "seed": spec.seed, "value": distance(starts[path], trained)}
        )
    return pd.DataFrame(rows, columns=["method", "held_out", "seed", "value"])


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return a sentence on the distance of the convolutions from their initial grid; none if they began on none."""
    means = frame[frame["measure"] == MEASURE].groupby("method", sort=False)["value"].mean()
    shown = ", ".join(f"{method} {value:.3f}" for method, value in means.items())
    sentence = "Convolutions, mean distance to the nearest level of the 8-bit grid that they began on, in steps: "
    return [f"{sentence}{shown}. Weights without a grid have {UNIFORM:g}."] if shown else []


def distance(start: files.Arrays, trained: files.Arrays) -> float:
    """Return the mean over all convolutions' weights of the distance to the nearest level of the start, in steps.

    Args:
        start: the initial weights, by the names of torchvision.
        trained: a checkpoint; for a quantized network its latent weights.
    """
    found = []
    for name, array in trained.items():
        for pattern, plain in NAMES.items():
            name = re.sub(pattern, plain, name)
        if array.ndim == 4 and name in start:
            step = np.abs(start[name]).astype(float).max(axis=(1, 2, 3), keepdims=True) / LEVELS
            places = array / np.where(step > 0, step, 1.0)
            found.append(np.abs(places - places.round()).ravel())
    return float(np.concatenate(found).mean()) if found else float("nan")
