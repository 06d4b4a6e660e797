"""A run's trained network, by any of its checkpoints."""

from pathlib import Path

from flatlab import files
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.models.networks import Ensemble, Network
from flatlab.specs.run import Place
from flatlab.store.runs import Run


def network(run: Run, checkpoint: str | Path, place: Place) -> Network | Ensemble:
    """Return a run's network, in eval mode, its quantizer attached where it has one.

    Args:
        run: of the network.
        checkpoint: "selected", "last", or the file of one that was kept along the training.
        place: data folder, device.
    """
    domains = loading_data.domains(run.spec, place)
    built = loading_network.finished(run.spec, domains.data, place)
    arrays, _ = files.load_arrays(run.checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint)
    loading_network.load(built, arrays)
    return built.eval()
