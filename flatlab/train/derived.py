"""Derived runs: made from a finished run's selected checkpoint, without training."""

import time

import torch

from flatlab import build, files
from flatlab.errors import UserError
from flatlab.models import Network
from flatlab.quant.attach import quantized_layers
from flatlab.quant.calibration import second_moments
from flatlab.quant.codebook import levels, searched_scale
from flatlab.quant.fixed import Fixed
from flatlab.quant.obc import Rounded, obc
from flatlab.quantspecs import OBCSpec, RTNSpec
from flatlab.runs import RunStore, check_data
from flatlab.specs import Place, RunSpec
from flatlab.train.imported import hand_in


def derive(spec: RunSpec, store: RunStore, place: Place) -> None:
    """Quantize the selected checkpoint of a run's parent, calibrated on its source domains alone.

    Args:
        spec: of a derived run.
        store: holds the parent, receives the run.
        place: data folder, device, threads.

    Raises:
        UserError: where the parent is not done, or its data differ.
    """
    run, parent = store.run(spec), store.run(spec.parent or spec)
    check_data([run], place)
    if run.done:
        return
    if not parent.done:
        raise UserError(f"Run {spec.digest} is made from run {parent.spec.digest}, which is not finished; train that.")
    started = time.monotonic()
    domains = build.domains(spec, place)
    parent.check_data(domains.data.fingerprint)
    with build.threads(place.threads):
        network = build.network(spec.replace(weights="none"), domains.data, place).eval()
        arrays, facts = files.load_arrays(parent.checkpoint("selected"))
        build.load(network, arrays)
        notes = quantize(network, spec, domains, place)
        run.create()
        hand_in(run, network, domains, place, row={"step": facts["step"], "layers": notes})
    run.note(parent=parent.spec.digest, sessions=[{"seconds": round(time.monotonic() - started, 3)}])
    run.finish()


@torch.no_grad()
def quantize(network: Network, spec: RunSpec, domains: build.Domains, place: Place) -> dict[str, dict[str, object]]:
    """Quantize a network in place by rounding or OBC; return what to note of each layer."""
    notes: dict[str, dict[str, object]] = {}
    moments = _moments(network, spec.quantizer, domains, place) if isinstance(spec.quantizer, OBCSpec) else {}
    build.quantize(network, spec)
    for name, quantized in quantized_layers(network).items():
        assert isinstance(quantized.quantizer, Fixed)
        match spec.quantizer:
            case RTNSpec() as q:
                scale = searched_scale(quantized.latent, q.bits, granularity=q.granularity)
                codes = (quantized.latent / scale).round().clamp(*levels(q.bits))
            case OBCSpec() as q:
                options = q.model_dump(include={"bits", "granularity", "damping", "exact_columns"})
                found: Rounded = obc(quantized.latent.detach(), moments[name], **options)
                codes, scale, notes[name] = found.codes, found.scale, found.facts()
        quantized.quantizer.settle(codes, scale)
    return notes


def _moments(network: Network, spec: OBCSpec, domains: build.Domains, place: Place) -> dict[str, torch.Tensor]:
    each = -(-spec.images // len(domains.sources))  # the domains weigh the same, as in training
    parts = domains.calibration(each, build.device(place))
    return second_moments(network, (inputs for batches in parts for inputs, _ in batches))
