"""From a run's checkpoint to a network, and to a landscape around it."""

from collections.abc import Collection
from pathlib import Path

import torch
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
from flatlab.runs import Run, RunStore
from flatlab.seeds import generator
from flatlab.specs import Place

SIZE = 128  # images of a batch that gives BatchNorm's statistics


def landscape(run: Run, spec: Probing, place: Place, *, of: Collection[str] | None = None) -> Landscape:
    """Return the loss of a run's checkpoint on each domain, or on some, as a function of its weights.

    Strata are the domains. A quantized network is baked, so that all methods move in one space; or, for
    `space="latent"`, quantized anew at each point, its step sizes held still.

    Raises:
        UserError: where latent weights are asked for that nothing follows, or the data differ from the run's.
    """
    batches = {name: each for name, each in images(run, spec, place).items() if of is None or name in of}
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


def training_images(run: Run, count: int | None, place: Place) -> Data | None:
    """Return batches of the first `count` training images of each seen domain, the domains mixed in each batch."""
    if count is None:
        return None
    batches = build.domains(run.spec, place).calibration(count, build.device(place))
    x, y = (torch.cat([pair[k] for domain in batches for pair in domain]) for k in range(2))
    order = torch.randperm(len(y), generator=generator("statistics", count)).to(y.device)
    return list(zip(torch.split(x[order], SIZE), torch.split(y[order], SIZE), strict=True))


def network(run: Run, checkpoint: str | Path, place: Place) -> Network | Ensemble:
    """Return a run's network, in eval mode, its quantizer attached where it has one.

    Args:
        run: of the network.
        checkpoint: "selected", "last", or the file of one that was kept along the training.
        place: data folder, device.
    """
    domains = build.domains(run.spec, place)
    built = build.finished(run.spec, domains.data, place)
    arrays, _ = files.load_arrays(run.checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint)
    build.load(built, arrays)
    return built.eval()


def other_of(run: Run, digest: str, place: Place) -> Run:
    """Return another run of the store, of the same data.

    Raises:
        UserError: where there is none, or its data are others.
    """
    other = RunStore(run.path.parent).find(digest)
    other.check_data(build.domains(run.spec, place).data.fingerprint)
    return other
