"""From a checkpoint to a measurement on disk: load, bake, lay a landscape around it, sample in resumable blocks."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch.nn.functional as F

from flatlab import build, files, machine
from flatlab.data.batches import evaluation_batches
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.results import FloatArray
from flatlab.metrics.sphere import SphereFlatness, sample_rays
from flatlab.models import Network
from flatlab.quant.attach import bake
from flatlab.runs import Probe, Run
from flatlab.specs import Place, ProbeSpec

BLOCK = 10  # directions between two files
Report = Callable[[int, int, dict[str, float]], None]


def measure(run: Run, spec: ProbeSpec, place: Place, *, report: Report | None = None) -> None:
    """Measure a finished run, from where an earlier call was stopped.

    Args:
        run: the run, done.
        spec: what to measure.
        place: data folder, device, threads.
        report: called with the directions done and asked for, and numbers to show.

    Raises:
        UserError: where the run is not finished, its data differ, or a file is damaged.
    """
    probe = run.probe(spec)
    if probe.done:
        return
    if not run.done:
        raise UserError(f"Run {run.spec.digest} is not finished, or was removed: train it before it is measured.")
    place = place.replace(threads=probe.provenance.get("threads", place.threads))  # they order the sums
    with build.threads(place.threads):
        _measure(run, probe, place, report)


def _measure(run: Run, probe: Probe, place: Place, report: Report | None) -> None:
    spec: ProbeSpec = probe.spec
    around = landscape(run, spec, place)
    probe.create()
    probe.note(machine=machine.facts(), **place.model_dump())
    samples = np.concatenate([_block(probe, around, start, report) for start in range(0, spec.num_samples, BLOCK)])
    flatness = SphereFlatness.from_samples(
        around, spec.radii, samples, seed=spec.seed, normalisation=spec.normalisation
    )
    _write(probe, flatness)
    probe.finish()


def landscape(run: Run, spec: ProbeSpec, place: Place) -> Landscape:
    """Return the loss of a run's checkpoint on each domain, as a function of its weights.

    Strata are the domains. A quantized network is baked, so that all methods move in one space; or, for
    `space="latent"`, quantized anew at each point, its step sizes held still.
    """
    domains = build.domains(run.spec, place)
    run.check_data(domains.data.fingerprint)
    rows = domains.inside if spec.split == "in" else domains.outside
    device = build.device(place)
    batches = {
        name: evaluation_batches(domains.data, name, rows[name], device=device, limit=spec.images)
        for name in domains.data.names
    }
    loaded = network(run, spec.checkpoint, place)
    if spec.space == "baked":
        bake(loaded)
        return Landscape(loaded, batches, F.cross_entropy, params=spec.params)
    scales = build.roles(loaded)["scales"].values()
    for scale in scales:
        scale.requires_grad_(False)
    return Landscape(loaded, batches, F.cross_entropy, params=spec.params)


def network(run: Run, checkpoint: str, place: Place) -> Network:
    """Return a run's network at a checkpoint, in eval mode, its quantizer attached where it has one."""
    domains = build.domains(run.spec, place)
    start = run.spec.replace(weights="none")  # the checkpoint holds all weights
    built = build.network(start, domains.data, place)
    build.quantize(built, run.spec)
    arrays, _ = files.load_arrays(run.checkpoint(checkpoint))
    build.load(built, arrays)
    return built.eval()


def _block(probe: Probe, around: Landscape, start: int, report: Report | None) -> FloatArray:
    """Return the rises of one block of directions (k, R, S), from its file where it is there."""
    path = probe.block(start // BLOCK)
    spec: ProbeSpec = probe.spec
    if not path.exists():
        rays = range(start, min(start + BLOCK, spec.num_samples))
        tell = partial(_tell, report, start, spec.num_samples) if report else None
        started = time.monotonic()
        rises = sample_rays(around, spec.radii, rays, seed=spec.seed, normalisation=spec.normalisation, report=tell)
        files.save_arrays(path, {"samples": rises})
        probe.note(seconds=round(probe.provenance.get("seconds", 0) + time.monotonic() - started, 3))
    arrays, _ = files.load_arrays(path)
    return arrays["samples"]


def _tell(report: Report, start: int, total: int, done: int, of: int) -> None:
    del of
    report(start + done, total, {})


def _write(probe: Probe, flatness: SphereFlatness) -> None:
    """Write the assembled measurement, readable without torch."""
    arrays = {"samples": flatness.samples, "radii": flatness.radii, "base_loss": flatness.base_loss}
    facts = {
        "strata": list(flatness.strata),
        "num_params": flatness.num_params,
        "norm": flatness.norm,
        "reach": flatness.reach,
        "images": flatness.cost.images,
    }
    files.save_arrays(probe.result, arrays, facts)
