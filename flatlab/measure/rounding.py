"""Bit widths as radii: rises of the loss at rounded weights, and at random ones at the same distance."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor

from flatlab import files
from flatlab.arguments import JobReport, Normalisation
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.measure.inputs import Layer, images, latent_network, quantizable, rounded
from flatlab.measure.units import UnitFiles
from flatlab.metrics.flatness.norm_matched import typical_rise
from flatlab.results.rounding import RoundingRise, RoundingRises
from flatlab.specs.measurements import RoundingSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run
from flatlab.tensors.flat import flatten

WHOLE: tuple[Normalisation, Normalisation] = ("none", "filter")  # of random noise, if all layers are rounded
ALONE: tuple[Normalisation, Normalisation] = ("layer", "filter")  # if one layer is rounded
Weights = Mapping[str, Tensor]
Part = tuple[str, dict[str, Tensor], Normalisation]


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure the rises of each part; resumes an earlier call."""
    spec: RoundingSpec = measurement.spec
    plain, trained = latent_network(run, spec.checkpoint, place)
    axes = {name: axis for name, axis in quantizable(plain).items() if fnmatchcase(name, spec.params or "*")}
    if not axes:
        raise UserError(f"No quantized weight matches {spec.params!r}; available: {', '.join(quantizable(plain))}.")
    around = Landscape(plain, images(run, spec, place), F.cross_entropy, params=list(axes))
    weights = {name: plain.get_parameter(name).detach().clone() for name in axes}
    found: dict[tuple[str, Normalisation], RoundingRise] = {}
    parts = list(_parts(spec, weights, trained, axes))
    for done, (part, vectors, normalisation) in enumerate(parts, 1):
        rise = typical_rise(
            around,
            vectors,
            normalisation=normalisation,
            num_samples=spec.num_samples,
            seed=spec.seed,
            keep=UnitFiles(measurement).units,
        )
        bits = tuple(name.partition("-")[2] for name in rise.names)  # the prefix distinguishes the parts' units
        found[part, normalisation] = replace(rise, names=bits)
        if report:
            report(done, len(parts), {})
    files.save_arrays(measurement.result, *RoundingRises(found, around.num_samples).to_arrays())


def _parts(
    spec: RoundingSpec, weights: Weights, trained: Mapping[str, Layer], axes: Mapping[str, int]
) -> Iterator[Part]:
    """Yield the part of the network that is rounded, its noise by bit width, and the normalisation.

    The noise of the run's own, learned step sizes has the name "trained".
    """
    whole = {f"{bits}": _noise(spec, weights, axes, bits) for bits in spec.bits}
    if trained:
        whole["trained"] = {name: trained[name].quantized - w for name, w in weights.items()}
    for normalisation in WHOLE:
        yield "all", {f"all-{each}": flatten(noise.values()) for each, noise in whole.items()}, normalisation
    alone = {f"{bits}": _noise(spec, weights, axes, bits) for bits in spec.layer_bits}
    if trained and alone:
        alone["trained"] = whole["trained"]
    for index, part in enumerate(weights if alone else ()):
        vectors = {
            f"{index:03d}-{each}": flatten(e if name == part else torch.zeros_like(e) for name, e in noise.items())
            for each, noise in alone.items()
        }
        for normalisation in ALONE:
            yield part, vectors, normalisation


def _noise(spec: RoundingSpec, weights: Weights, axes: Mapping[str, int], bits: int) -> dict[str, Tensor]:
    """Return the noise that rounding to the nearest level adds to each weight."""
    found = {
        name: rounded(w, bits, granularity=spec.granularity, name=name, axis=axes[name]) for name, w in weights.items()
    }
    return {name: found[name].quantized - w for name, w in weights.items()}
