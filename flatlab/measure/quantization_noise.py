"""Quantization noise: histograms, divergences and symmetry of each layer that a run has quantized."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flatlab import files
from flatlab.errors import UserError
from flatlab.measure.inputs import Layer, rounded, trained_layers
from flatlab.metrics.quantization_noise import quantization_noise
from flatlab.results.estimate import FloatArray
from flatlab.results.quantization_noise import QuantizationNoise
from flatlab.specs.measurements import QuantizationNoiseSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run

Report = Callable[[int, int, dict[str, float]], None]


def fill(measurement: Measurement, run: Run, place: Place, report: Report | None) -> None:
    """Measure each layer in three ways; no image is looked at."""
    spec: QuantizationNoiseSpec = measurement.spec
    spec.check(run.spec)
    layers = trained_layers(run, spec.checkpoint, place)
    arrays: files.Arrays = {}
    facts: list[dict[str, Any]] = []
    for index, (name, layer) in enumerate(layers.items()):
        for mode, noise in _modes(name, layer, spec):
            arrays |= _histogram(f"{mode}-{index:03d}", noise.noise, spec.bins)
            arrays |= {
                f"lower-{mode}-{index:03d}": noise.symmetry.lower,
                f"upper-{mode}-{index:03d}": noise.symmetry.upper,
            }
            facts.append({"layer": name, "index": index, "mode": mode, "bits": layer.bits, **noise.statistics()})
        arrays |= _histogram(f"weight-{index:03d}", layer.weight.flatten().double().cpu().numpy(), spec.bins)
        if report:
            report(index + 1, len(layers), {})
    files.save_arrays(measurement.result, arrays, facts)


def _modes(name: str, layer: Layer, spec: QuantizationNoiseSpec) -> Iterator[tuple[str, QuantizationNoise]]:
    """Yield the run's own noise in its steps and raw, and that of one step size for the whole tensor."""
    pooled = rounded(layer.weight, layer.bits, granularity="tensor", name=name)
    ways = {"normalised": (layer, True), "raw": (layer, False), "tensor": (pooled, False)}
    for mode, (each, normalise) in ways.items():
        try:
            yield (
                mode,
                quantization_noise(
                    each.weight, each.quantized, step=each.step, normalise=normalise, bins=spec.bins, seed=spec.seed
                ),
            )
        except UserError as error:
            raise UserError(f"Layer {name}: {error}") from None


def _histogram(name: str, values: FloatArray, bins: int) -> files.Arrays:
    counts, edges = np.histogram(values, bins)
    return {name: counts, f"edges-{name}": edges}
