"""From a run's checkpoint to a network, and to a landscape around it."""

import torch.nn.functional as F

from flatlab import build, files
from flatlab.data.batches import evaluation_batches
from flatlab.errors import UserError
from flatlab.landscape import Landscape
from flatlab.models import Ensemble, Network
from flatlab.nests import Data
from flatlab.probespecs import Probing
from flatlab.quant.attach import bake, quantized_layers
from flatlab.quant.lsq import LSQ
from flatlab.runs import Run
from flatlab.specs import Place


def landscape(run: Run, spec: Probing, place: Place) -> Landscape:
    """Return the loss of a run's checkpoint on each domain, as a function of its weights.

    Strata are the domains. A quantized network is baked, so that all methods move in one space; or, for
    `space="latent"`, quantized anew at each point, its step sizes held still.

    Raises:
        UserError: where latent weights are asked for that nothing follows, or the data differ from the run's.
    """
    batches = images(run, spec, place)
    loaded = network(run, spec.checkpoint, place)
    if spec.space == "baked":
        bake(loaded)
        return Landscape(loaded, batches, F.cross_entropy, params=spec.params)
    if any(not isinstance(quantizer, LSQ) for _, quantizer in quantized_layers(loaded).values()):
        raise UserError(
            f"Run {run.spec.digest} ({run.spec.label}) has settled codes, which no latent weight moves; take baked."
        )
    scales = build.roles(loaded)["scales"].values()
    for scale in scales:
        scale.requires_grad_(False)
    return Landscape(loaded, batches, F.cross_entropy, params=spec.params)


def images(run: Run, spec: Probing, place: Place) -> dict[str, Data]:
    """Return the batches of each domain that a measurement looks at."""
    domains = build.domains(run.spec, place)
    run.check_data(domains.data.fingerprint)
    rows = domains.inside if spec.split == "in" else domains.outside
    device = build.device(place)
    return {
        name: evaluation_batches(domains.data, name, rows[name], device=device, limit=spec.images)
        for name in domains.data.names
    }


def network(run: Run, checkpoint: str, place: Place) -> Network | Ensemble:
    """Return a run's network at a checkpoint, in eval mode, its quantizer attached where it has one."""
    domains = build.domains(run.spec, place)
    built = build.finished(run.spec, domains.data, place)
    arrays, _ = files.load_arrays(run.checkpoint(checkpoint))
    build.load(built, arrays)
    return built.eval()
