"""From a checkpoint to a measurement on disk: load, bake, lay a landscape around it, sample in resumable blocks."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout

from flatlab import build, files, machine
from flatlab.data.batches import evaluation_batches
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.metrics.results import FloatArray
from flatlab.metrics.sampling import Sampler, Unit, Walk
from flatlab.metrics.sphere import SphereFlatness, sample
from flatlab.models import Network
from flatlab.quant.attach import bake
from flatlab.runs import Probe, Run
from flatlab.specs import Place, ProbeSpec

IDLE_SECONDS = 0.05  # between two looks at units that others compute
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
    torch.set_num_threads(place.threads)
    around = landscape(run, spec, place)
    probe.create()
    probe.note(machine=machine.facts(), **place.model_dump())
    shelf = Shelf(probe)
    sampler = Sampler([around], spec.seed, spec.normalisation, keep=shelf.units)
    (flatness,) = sample(
        sampler,
        spec.radii if spec.radii == "auto" else np.array(spec.radii),
        spec.num_samples,
        (spec.rel_error, spec.abs_error),
        spec.budget,
        block_size=spec.block_size,
        report=partial(_tell, report, sampler) if report else None,
    )
    if "interrupted" in flatness.stopped:
        raise KeyboardInterrupt  # its units are kept: the next call goes on from them
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


class Shelf:
    """Units of a measurement as files of its probe, which any number of processes fill together."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def units(self, units: Sequence[Unit]) -> Iterator[FloatArray]:
        """Yield the units' arrays in their order; those that nobody else computes at this moment are computed here."""
        for index, (name, _) in enumerate(units):
            path = self.probe.unit(name)
            while not path.exists():
                free = (each for each in units[index:] if self._fill(*each))
                if next(free, None) is None and not path.exists():
                    time.sleep(IDLE_SECONDS)  # all that is missing is in other hands
            yield files.load_arrays(path)[0]["unit"]

    def _fill(self, name: str, compute: Callable[[], FloatArray]) -> bool:
        """Compute and keep a unit if it is missing and nobody is at it; returns whether that was so."""
        path = self.probe.unit(name)
        if path.exists():
            return False
        try:
            with FileLock(self.probe.path / f".{name}.lock", timeout=0):
                if path.exists():
                    return False
                started = time.monotonic()
                files.save_arrays(path, {"unit": compute()})
        except Timeout:
            return False
        self.probe.note(seconds=round(self.probe.provenance.get("seconds", 0) + time.monotonic() - started, 3))
        return True


def _tell(report: Report, sampler: Sampler, walks: Sequence[Walk]) -> None:
    """Report the share of the visits that are foreseen, and the relative error at the radius that is worst off."""
    made = sum(walk.visits.shape[1] for walk in walks)
    foreseen = sum(
        seen if walk.stopped else max(walk.plan.visits, seen + 1) for walk in walks for seen in walk.visits.shape[1:2]
    )
    errors = [
        e.stderr / abs(e.value) for walk in walks if walk.visits.shape[1] > 1 and (e := sampler.estimate(walk)).value
    ]
    report(made, max(foreseen, made), {"relative error": max(errors, default=float("nan"))})


def _write(probe: Probe, flatness: SphereFlatness) -> None:
    """Write the assembled measurement, readable without torch."""
    visits = {f"visits-{index:02d}": rises for index, rises in enumerate(flatness.visits)}
    facts = {
        "strata": list(flatness.strata),
        "blocks": list(flatness.blocks),
        "plans": [asdict(plan) for plan in flatness.plans],
        "stopped": list(flatness.stopped),
        "num_params": flatness.num_params,
        "norm": flatness.norm,
        "reach": flatness.reach,
        "images": flatness.cost.images,
    }
    files.save_arrays(probe.result, {**visits, "radii": flatness.radii, "base_loss": flatness.base_loss}, facts)
