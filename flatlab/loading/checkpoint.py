"""A run's trained network, from any of its checkpoints."""

from pathlib import Path
from typing import Any

from torch import nn

from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.models.networks import Ensemble, Network
from flatlab.specs.run import Place
from flatlab.store.runs import Run


def network(run: Run, checkpoint: str | Path, place: Place) -> Network | Ensemble:
    """Return a run's network, in eval mode, with its quantizer if it has one.

    Args:
        run: the run of the network.
        checkpoint: "selected", "last", or the file of a checkpoint kept during training.
        place: data folder, device.
    """
    domains = loading_data.domains(run.spec, place)
    built = loading_network.finished(run.spec, domains.data, place)
    restore(built, run, run.checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint)
    return built.eval()


def restore(built: nn.Module, run: Run, checkpoint: Path) -> dict[str, Any]:
    """Load the weights of a checkpoint's file of a run into a network of its architecture; return the file's facts.

    Raises:
        UserError: if the file is damaged, or names or shapes do not fit.
    """
    arrays, facts = run.arrays(checkpoint)
    loading_network.load(built, arrays)
    found: dict[str, Any] = facts
    return found
