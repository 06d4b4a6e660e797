"""Ranges of activations for 256 or 128 levels, from training images of the source domains."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper

from flatlab.deploy.graph import INPUT, Graph, Range
from flatlab.deploy.session import opened
from flatlab.errors import UserError

Array = npt.NDArray[Any]
BINS, KEPT = 2048, 0.9999  # of a histogram; share of the values within the range of "percentile"
SHRUNK = np.linspace(0.3, 1.0, 71)  # candidates of "mse": fractions of the whole range


def ranges(graph: Graph, batches: Sequence[Array], rule: str, *, top: int = 255) -> dict[str, Range]:
    """Return the range of each tensor that is rounded, by name.

    Args:
        graph: the graph, with weights still in floats.
        batches: images (N, C, H, W).
        rule: "min-max", "percentile" (without the outer 0.01 % of the values) or "mse" (the least squared error).
        top: the highest code.

    Raises:
        UserError: there are no images, or no layer computes in integers.
    """
    if not batches:
        raise UserError("int8 activations need at least one image of the source domains for calibration, got none.")
    names = graph.rounded()
    if not names:
        raise UserError("--activations int8 needs quantized convolutions, and this network has none; leave it out.")
    model = type(graph.model).FromString(graph.model.SerializeToString())
    computed = [name for name in names if name != INPUT]
    model.graph.output.extend(map(helper.make_empty_tensor_value_info, computed))
    session = opened(model.SerializeToString())

    def each_batch() -> Any:
        for batch in batches:
            found = session.run(computed, {INPUT: batch}) if computed else []
            yield {INPUT: batch, **dict(zip(computed, found, strict=True))}

    ends = [{name: (float(value.min()), float(value.max())) for name, value in each.items()} for each in each_batch()]
    whole = {name: (min(end[name][0] for end in ends), max(end[name][1] for end in ends)) for name in names}
    if rule == "min-max":
        return {name: Range(*span, top) for name, span in whole.items()}
    counts = {name: np.zeros(BINS) for name in names}
    for each in each_batch():
        for name, value in each.items():
            counts[name] += np.histogram(value, BINS, _open(*whole[name]))[0]
    choose = _percentile if rule == "percentile" else _least_error
    return {name: choose(counts[name], Range(*_open(*whole[name]), top)) for name in names}


def _open(low: float, high: float) -> tuple[float, float]:
    return low, max(high, low + 1e-12)


def _percentile(counts: Array, whole: Range) -> Range:
    share, edges = np.cumsum(counts) / counts.sum(), np.linspace(whole.low, whole.high, len(counts) + 1)
    outside = (1 - KEPT) / 2
    first, last = np.searchsorted(share, [outside, 1 - outside])
    return replace(whole, low=float(edges[first]), high=float(edges[min(last, len(counts) - 1) + 1]))


def _least_error(counts: Array, whole: Range) -> Range:
    edges = np.linspace(whole.low, whole.high, len(counts) + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    tried = [replace(whole, low=whole.low * share, high=whole.high * share) for share in SHRUNK]
    return min(tried, key=lambda each: _error(each, middles, counts))


def _error(each: Range, values: Array, counts: Array) -> float:
    scale, zero = each.grid
    codes = np.clip(np.rint(values / scale) + zero, 0, each.top) - float(zero)
    return float((counts * (codes * scale - values) ** 2).sum())
