"""Quantization noise: histograms, divergences and symmetry of each layer that a run has quantized."""

from collections.abc import Iterator

from flatlab import files
from flatlab.arguments import JobReport
from flatlab.errors import UserError
from flatlab.measure.inputs import Layer, rounded, trained_layers
from flatlab.metrics.quantization_noise import quantization_noise
from flatlab.results.quantization_noise import LayerNoise, NetworkNoise, QuantizationNoise
from flatlab.specs.measurements import QuantizationNoiseSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure each layer in three modes; no image is evaluated."""
    spec: QuantizationNoiseSpec = measurement.spec
    spec.check(run.spec)
    layers = trained_layers(run, spec.checkpoint, place)
    found: list[LayerNoise] = []
    for index, (name, layer) in enumerate(layers.items()):
        weight = layer.weight.flatten().double().cpu().numpy()
        for mode, noise in _modes(name, layer, spec):
            found.append(
                LayerNoise.of(noise, weight, {"layer": name, "index": index, "mode": mode, "bits": layer.bits})
            )
        if report:
            report(index + 1, len(layers), {})
    files.save_arrays(measurement.result, *NetworkNoise(tuple(found)).to_arrays())


def _modes(name: str, layer: Layer, spec: QuantizationNoiseSpec) -> Iterator[tuple[str, QuantizationNoise]]:
    """Yield the run's own noise in units of its steps and raw, and that of one step size for the whole tensor."""
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
