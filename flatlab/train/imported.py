"""A run from a checkpoint that was trained elsewhere, so that people can measure what they already have."""

from pathlib import Path
from textwrap import shorten

import torch

from flatlab import build, files, machine
from flatlab.errors import UserError
from flatlab.models import Network, read_foreign, translate_keys
from flatlab.runs import Run, RunStore
from flatlab.selection import Row
from flatlab.settings import Setting
from flatlab.specs import Place, RunSpec
from flatlab.train.evaluate import Judge
from flatlab.train.trajectory import arrays


def import_checkpoint(file: Path, setting: Setting, store: RunStore, place: Place) -> RunSpec:
    """Take a foreign checkpoint into the store as a finished run; returns its spec, which names the file by its hash.

    Args:
        file: safetensors, or what `torch.load(weights_only=True)` reads; torchvision's, DomainBed's or SWAD's names.
        setting: data set, held-out domain (one) and model.
        store: receives the run.
        place: data folder, device.

    Raises:
        UserError: where the file is missing or of another architecture, or more than one domain is held out.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}; give the .safetensors or .pth file that is to be imported.")
    if len(setting.held_out) != 1:
        raise UserError(f"Say which domain the checkpoint has not seen: --held-out {'|'.join(setting.domains)}.")
    spec = _spec(file, setting)
    run = store.run(spec)
    if run.done:
        return spec
    domains = build.domains(spec, place)
    network = build.network(spec, domains.data, place)
    _load(network, translate_keys(read_foreign(file)), file, setting.model)
    with run.claim() as free:
        if not free:
            raise UserError(f"Run {spec.digest} is being imported by another process; wait for that.")
        hand_in(run, network, domains, place, row={"step": 0})
        run.note(file=file.name)
        run.finish()
    return spec


def hand_in(run: Run, network: Network, domains: build.Domains, place: Place, *, row: Row) -> None:
    """Write what a training would leave behind but `done`: a log of one row, both checkpoints, provenance.

    Args:
        run: receives it.
        network: the network, in eval mode.
        domains: its data.
        place: data folder, device, threads.
        row: the step that the weights are of, and more for the log.
    """
    scores = Judge(domains, build.device(place)).row(network, row["step"])
    run.write_log([{**scores, **row, "looks": 1}])
    for name in ("selected", "last"):
        files.save_arrays(run.checkpoint(name), arrays(network.state_dict()), {"step": row["step"]})
    run.note(**place.model_dump(), data_fingerprint=domains.data.fingerprint, machine=machine.facts())


def _spec(file: Path, setting: Setting) -> RunSpec:
    return RunSpec(
        dataset=setting.dataset,
        held_out=setting.held_out[0],
        image_size=setting.image_size,
        model=setting.model,
        trial_seed=setting.trial_seed,
        steps=1,  # how it was trained is not known here; the source says so
        eval_every=1,
        lr=setting.lr,
        source=f"sha256:{files.file_hash(file)}",
    )


def _load(network: torch.nn.Module, tensors: dict[str, torch.Tensor], file: Path, model: str) -> None:
    if any("parametrizations" in name or "quan_w_fn" in name for name in tensors):
        raise UserError(
            f"{file.name} holds a quantized network's latent weights and step sizes; bake() it, then import."
        )
    expected = network.state_dict()
    given = {name: value for name, value in tensors.items() if name in expected or not name.endswith("tracked")}
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**counters, **given})
    except RuntimeError as error:
        reason = shorten(str(error).splitlines()[1].strip(), 120)
        raise UserError(f"{file.name} is not a checkpoint of {model} with {len(expected)} tensors: {reason}") from None
