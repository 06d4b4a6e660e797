"""Measures to be compared with generalization gaps, and accuracy on corrupted images of the source domains."""

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab import files
from flatlab.arguments import FloatArray, JobReport
from flatlab.data.batches import evaluation_batches
from flatlab.data.corruptions import corrupted
from flatlab.landscape.landscape import Landscape
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.loading.checkpoint import network
from flatlab.measure.inputs import images, trained_layers
from flatlab.measure.units import UnitFiles
from flatlab.metrics.flatness.largest_noise import largest_noise, pac_bayes, rounding_penalty
from flatlab.metrics.flatness.sharpness import worst_sharpness
from flatlab.quant.attach import bake
from flatlab.results.sharpness import Generalisation
from flatlab.specs.generalisation import SEVERITIES, GeneralisationSpec
from flatlab.specs.run import Place
from flatlab.store.runs import Measurement, Run
from flatlab.tensors.flat import flatten

LOWEST = 0.1  # quantile of the margins (Jiang et al. 2019, arXiv 1810.00113)
BATCH = 512  # images


def fill(measurement: Measurement, run: Run, place: Place, report: JobReport | None) -> None:
    """Measure the numbers and accuracies; resumes an earlier call."""
    spec: GeneralisationSpec = measurement.spec
    baked = cache(lambda: _baked(run, spec, place))

    def numbers() -> FloatArray:
        found = _numbers(run, spec, place, baked())
        return np.array([found[name] for name in Generalisation.NAMES])

    def accuracies() -> FloatArray:
        severities = range(1, 1 + SEVERITIES)
        found = [
            _accuracy(run, spec, place, baked(), f"{name}:{level}") for name in spec.corruptions for level in severities
        ]
        return np.array(found).reshape(-1, SEVERITIES)

    first, second = UnitFiles(measurement).units([("numbers", numbers), ("accuracies", accuracies)])
    values = dict(zip(Generalisation.NAMES, first.tolist(), strict=True))
    files.save_arrays(measurement.result, *Generalisation(values, spec.corruptions, second).to_arrays())
    if report:
        report(1, 1, {})


def _baked(run: Run, spec: GeneralisationSpec, place: Place) -> nn.Module:
    loaded = network(run, spec.checkpoint, place)
    bake(loaded)
    return loaded


def _pooled(run: Run, spec: GeneralisationSpec, place: Place) -> tuple[Tensor, Tensor]:
    """Return images (N, C, H, W) of the source domains and their classes (N,)."""
    every, sources = images(run, spec, place), loading_data.domains(run.spec, place).sources
    x, y = (torch.cat([batch[k] for name in sources for batch in every[name]]) for k in range(2))
    return x, y


def _numbers(run: Run, spec: GeneralisationSpec, place: Place, baked: nn.Module) -> dict[str, float]:
    """Return each measure by its name."""
    domains = loading_data.domains(run.spec, place)
    pairs = list(zip(*(torch.split(each, BATCH) for each in _pooled(run, spec, place)), strict=True))
    around = Landscape(baked, pairs, F.cross_entropy, params=spec.params)
    first = loading_network.network(run.spec, domains.data, place)
    moved = around.point - flatten([first.get_parameter(name).detach() for name in around.named])
    options: dict[str, Any] = {"drop": spec.drop, "num_samples": spec.num_samples, "seed": spec.seed}
    sigma, aware = largest_noise(around, **options), largest_noise(around, relative=True, **options)
    bounds = pac_bayes(moved, sigma, aware, num_samples=sum(len(domains.in_[name]) for name in domains.sources))
    worst = worst_sharpness(around, [spec.rho], block_size=around.num_samples, steps=spec.ascent, seed=spec.seed)
    steps = _steps(run, spec, place, around)
    penalty = rounding_penalty(around, steps, num_samples=spec.products, seed=spec.seed)
    with torch.no_grad():
        logits = torch.cat([baked(inputs) for inputs, _ in pairs])
    return {
        "sigma": sigma,
        "relative_sigma": aware,
        "pac_bayes": bounds["plain"],
        "magnitude_aware": bounds["magnitude-aware"],
        "sharpness": worst.estimates[0].value,
        "distance": float(moved.norm()),
        "margin": margin(logits, torch.cat([labels for _, labels in pairs])),
        "penalty": penalty.value,
        "penalty_stderr": penalty.stderr,
    }


def _steps(run: Run, spec: GeneralisationSpec, place: Place, around: Landscape) -> Tensor:
    """Return the step size of each parameter (P,): 0 if it is not quantized."""
    layers = trained_layers(run, spec.checkpoint, place)
    none = torch.zeros(())
    each = ((layers[name].step if name in layers else none, tensor) for name, tensor in around.named.items())
    return flatten([step.to(tensor.device).expand_as(tensor) for step, tensor in each])


def margin(logits: Tensor, labels: Tensor) -> float:
    """Return the tenth percentile of the logit of the right class less the largest other one.

    Args:
        logits: (N, C).
        labels: (N,) right classes.
    """
    right = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return float(torch.quantile((right - others).double(), LOWEST))


def _accuracy(run: Run, spec: GeneralisationSpec, place: Place, baked: nn.Module, corruption: str) -> float:
    """Return the accuracy on corrupted images of the source domains, with equal weights of the domains.

    The images are those of the test split, or of the out split if a run has no test split.
    """
    domains = loading_data.domains(run.spec, place)
    kept = domains.test or {name: domains.out[name] for name in domains.sources}
    rows = {name: each[: spec.images] for name, each in kept.items()}
    data, device = corrupted(domains.data, corruption, rows), loading_data.device(place)
    batches = {name: evaluation_batches(data, name, np.arange(len(rows[name])), device=device) for name in rows}
    accuracy = Landscape(baked, batches, F.cross_entropy, check=False).evaluate().accuracy
    assert accuracy is not None
    return accuracy
