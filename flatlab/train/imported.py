"""A run from a checkpoint of another code base or from an exported file, so that it can be measured."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from flatlab import environment, files
from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.loading.export import Export, JointExport, is_export, load_exported, opened, packed
from flatlab.models import classifiers, clip
from flatlab.models.foreign import fitted, read_foreign
from flatlab.models.networks import Network
from flatlab.quant.attach import attach_each, layers
from flatlab.quant.codebook import levels
from flatlab.quant.fixed import Fixed
from flatlab.specs.quantizers import RTNSpec
from flatlab.specs.run import Place, RunSpec
from flatlab.specs.settings import Setting
from flatlab.store.runs import Run, RunStore, check_data
from flatlab.store.selection import Row
from flatlab.train.evaluate import Evaluator
from flatlab.train.trajectory import arrays as arrays_of


def import_checkpoint(file: Path, setting: Setting, store: RunStore, place: Place) -> RunSpec:
    """Import a foreign checkpoint into the store as a finished run; return its spec, which has the file's hash.

    Args:
        file: safetensors, or a file that `torch.load(weights_only=True)` reads, with the names of torchvision,
            DomainBed, SWAD or timm; or a file that flatlab exported, whose model is used instead of the setting's and
            whose integer codes are kept.
        setting: data set, held-out domain (one) and model.
        store: receives the run.
        place: data folder, device.

    Returns:
        The spec of the run.

    Raises:
        UserError: the file does not exist or does not fit the model, or the setting does not hold out one domain.
    """
    if not file.is_file():
        raise UserError(f"There is no file {file}; give the .safetensors or .pth file that is to be imported.")
    if len(setting.held_out) != 1:
        raise UserError(f"Give the domain held out in training: --held-out {'|'.join(setting.domains)}.")
    exported = opened(file) if is_export(file) else None
    spec = _spec(file, setting)
    if exported:
        spec = _as_exported(spec, *exported)
    run = store.run(spec)
    check_data([run], place)
    if run.done:
        return spec
    domains = loading_data.domains(spec, place)
    if exported:
        network = _rebuilt(spec, file, domains, place)
    else:
        network = loading_network.network(spec, domains.data, place)
        state = read_foreign(file)
        if isinstance(network.features, clip.ImageTower) and any(key.startswith("vision_model.") for key in state):
            clip.load(network.features, state, name=spec.model, source=file.name)
            loading_network.align(network, spec, state, domains.data, place)
        else:
            _fill(network, state, file, setting.model)
        if config := loading_network.config_of(spec.model, place):
            classifiers.order_classes(network.head, config, domains.data.classes)
    with run.claim() as free:
        if not free:
            raise UserError(f"Run {spec.digest} is being imported by another process; wait for that.")
        hand_in(run, network, domains, place, row={"step": 0})
        run.note(file=file.name)
        run.finish()
    return spec


def _fill(network: Network, state: Mapping[str, Tensor], file: Path, name: str) -> None:
    """Load a foreign file, which must contain every tensor of the network."""
    if not isinstance(network.features, classifiers.Sentences):
        network.load_state_dict(fitted(state, network.state_dict(), name=name, source=file.name))
    elif lacking := classifiers.load(network.features, network.head, state, name=name, source=file.name):
        raise UserError(f"{file.name} has no {', '.join(lacking)} for these classes: train from it instead.")


def hand_in(run: Run, network: Network, domains: loading_data.Domains, place: Place, *, row: Row) -> None:
    """Write the files of a trained run except `done`: a log of one row, both checkpoints, provenance.

    Args:
        run: receives the files.
        network: the network, in eval mode.
        domains: its data.
        place: data folder, device, threads.
        row: the step of the weights (`step`), and further entries of the log's row.
    """
    scores = Evaluator(domains, loading_data.device(place), run.spec).row(network, row["step"])
    run.write_log([{**scores, **row, "looks": int(run.spec.target_logged)}])
    for name in ("selected", "last"):
        files.save_arrays(run.checkpoint(name), arrays_of(network.state_dict()), {"step": row["step"]})
    run.note(**place.model_dump(), data_fingerprint=domains.data.fingerprint, machine=environment.facts())


def _as_exported(spec: RunSpec, arrays: files.Arrays, facts: Export | JointExport) -> RunSpec:
    """Return the spec of an exported network: quantized if its codes fit a signed uniform grid, else with floats."""
    if isinstance(facts, JointExport):
        raise UserError("The file holds an ensemble: export its members, import these, and run `flatlab ensemble`.")
    if facts.network.activations:
        raise UserError("The file's network quantizes activations, which an imported run cannot: train the network.")
    weights = packed(arrays, facts).values()
    bits = max((grid.bits for grid in facts.quantized.values()), default=0)
    ours = bits > 0
    if ours:
        low, high = levels(bits)
        ours = all(
            each.grid == "uniform" and low <= int(each.codes.min()) and int(each.codes.max()) <= high
            for each in weights
        )
    granularity = "channel" if all(each.scale.ndim for each in weights) else "tensor"
    quantizer = RTNSpec.make(bits=bits, granularity=granularity) if ours else None
    return spec.replace(model=facts.network.name, quantizer=quantizer)


def _rebuilt(spec: RunSpec, file: Path, domains: loading_data.Domains, place: Place) -> Network:
    """Return the network of an exported file, with the file's codes in the quantizers of its spec."""
    arrays, facts = opened(file)
    assert isinstance(facts, Export)
    own = {"num_classes": len(domains.data.classes), "in_channels": domains.data.domains[0].images.shape[1]}
    theirs = facts.network.model_dump(include=set(own))
    if theirs != own:
        raise UserError(f"{file.name} is of other data: it has {theirs}, and {spec.dataset} {own}.")
    baked = load_exported(file)
    if spec.quantizer:
        codes = {key.rpartition(".")[0]: each for key, each in packed(arrays, facts).items()}
        span = levels(spec.quantizer.bits)
        if layers(baked).keys() != codes.keys():
            raise UserError(f"{file.name} holds codes of some layers only, which an imported run cannot have.")
        attach_each(baked, lambda name, *_: Fixed(codes[name].codes, codes[name].scale, span))
    network = loading_network.finished(spec, domains.data, place)
    assert isinstance(network, Network)
    loading_network.load(network, arrays_of(baked.state_dict()))
    return network.eval()


def _spec(file: Path, setting: Setting) -> RunSpec:
    return RunSpec(
        dataset=setting.dataset,
        held_out=setting.held_out[0],
        corruption=setting.corruption,
        image_size=setting.image_size,
        model=setting.model,
        trial_seed=setting.trial_seed,
        steps=1,  # how it was trained is not known here; the source says so
        eval_every=1,
        lr=setting.lr,
        source=f"sha256:{files.file_hash(file)}",
    )
