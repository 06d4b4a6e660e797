"""Runs that are made from finished ones: post-training quantization (rounding, OBC) and ensembles."""

import time
from dataclasses import replace

import torch

from flatlab import environment, files
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.loading.checkpoint import restore
from flatlab.models.networks import Ensemble, Network
from flatlab.quant.attach import channel_axis, quantized_layers
from flatlab.quant.calibration import second_moments
from flatlab.quant.codebook import levels, searched_scale
from flatlab.quant.fixed import Fixed
from flatlab.quant.obc import Rounded, obc
from flatlab.specs.quantizers import OBCSpec, RTNSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import RunStore, check_data
from flatlab.train.evaluate import Evaluator
from flatlab.train.imported import hand_in
from flatlab.train.trajectory import arrays


def derive(spec: RunSpec, store: RunStore, place: Place) -> None:
    """Quantize the selected checkpoint of a run's parent; OBC is calibrated on images of its source domains.

    Args:
        spec: a derived run.
        store: holds the parent and receives the run.
        place: data folder, device, threads.

    Raises:
        UserError: the parent is not done, or was trained on other data.
    """
    run, parent = store.run(spec), store.run(spec.parent or spec)
    check_data([run], place)
    if run.done:
        return
    parent.require_done()
    started = time.monotonic()
    domains = loading_data.domains(spec, place)
    parent.check_data(domains.data.fingerprint)
    with loading_data.computing(place.threads):
        network = loading_network.network(spec.replace(weights="none"), domains.data, place).eval()
        facts = restore(network, parent, parent.checkpoint("selected"))
        notes = quantize(network, spec, domains, place)
        run.create()
        hand_in(run, network, domains, place, row={"step": facts["step"], "layers": notes})
    run.note(parent=parent.spec.digest, sessions=[{"seconds": round(time.monotonic() - started, 3)}])
    run.finish()


@torch.no_grad()
def quantize(
    network: Network, spec: RunSpec, domains: loading_data.Domains, place: Place
) -> dict[str, dict[str, object]]:
    """Quantize a network in place by rounding or OBC; return facts of each layer for the log (OBC's errors)."""
    notes: dict[str, dict[str, object]] = {}
    moments = _moments(network, spec.quantizer, domains, place) if isinstance(spec.quantizer, OBCSpec) else {}
    loading_network.quantize(network, spec)
    for name, quantized in quantized_layers(network).items():
        assert isinstance(quantized.quantizer, Fixed)
        axis = channel_axis(quantized.layer)
        rows = quantized.latent.detach().movedim(axis, 0)  # output channels first
        match spec.quantizer:
            case RTNSpec() as q:
                scale = searched_scale(rows, q.bits, granularity=q.granularity)
                codes = (rows / scale).round().clamp(*levels(q.bits))
            case OBCSpec() as q:
                options = q.model_dump(include={"bits", "granularity", "damping", "exact_columns"})
                found: Rounded = obc(rows, moments[name], **options)
                codes, scale, notes[name] = found.codes, found.scale, found.facts()
        quantized.quantizer.settle(codes.movedim(0, axis), scale.movedim(0, axis) if scale.dim() else scale)
    return notes


def _moments(network: Network, spec: OBCSpec, domains: loading_data.Domains, place: Place) -> dict[str, torch.Tensor]:
    each = -(-spec.images // len(domains.sources))  # the same number of images of each domain, as in training
    parts = domains.calibration(each, loading_data.device(place))
    return second_moments(network, (inputs for batches in parts for inputs, _ in batches))


def join(spec: RunSpec, store: RunStore, place: Place) -> None:
    """Make an ensemble of finished runs, each at its selected checkpoint.

    Args:
        spec: the ensemble.
        store: holds the members and receives the ensemble.
        place: data folder, device.

    Raises:
        UserError: a member is not done, or was trained on other data.
    """
    run = store.run(spec)
    check_data([run], place)
    if run.done:
        return
    domains = loading_data.domains(spec, place)
    network = loading_network.finished(spec, domains.data, place)
    assert isinstance(network, Ensemble)
    for built, member in zip(network.members, map(store.run, spec.members), strict=True):
        member.require_done()
        member.check_data(domains.data.fingerprint)
        restore(built, member, member.checkpoint("selected"))
    run.create()
    judge = Evaluator(replace(domains, test={}), loading_data.device(place), spec)
    row = judge.row(network.eval(), spec.steps)
    run.write_log([{**row, "looks": int(spec.target_logged)}])
    for name in ("selected", "last"):
        files.save_arrays(run.checkpoint(name), arrays(network.state_dict()), {"step": spec.steps})
    run.note(**place.model_dump(), data_fingerprint=domains.data.fingerprint, machine=environment.facts())
    run.finish()
