"""From a spec to things: its domains and splits, its network, its parameters by role, its device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flatlab.data import batches, sources
from flatlab.data.domains import DomainSet, split
from flatlab.errors import UserError, choose
from flatlab.files import file_hash
from flatlab.models import Ensemble, Network, build_network
from flatlab.quant import attach
from flatlab.quant.fixed import Fixed
from flatlab.quant.inq import INQ
from flatlab.quantspecs import INQSpec, QuantSpec
from flatlab.specs import Place, RunSpec

Rows = dict[str, npt.NDArray[np.int64]]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Domains:
    """The data of a run: who is seen, who is held out, and the split of each domain."""

    data: DomainSet
    target: str
    inside: Rows  # trained on (sources); of the target all that is not outside, 80 %: reported on
    outside: Rows  # 20 %: validation
    tested: Rows  # of the sources, kept for an in-domain test; may be none

    @property
    def sources(self) -> tuple[str, ...]:
        """The seen domains."""
        return tuple(name for name in self.data.names if name != self.target)

    def evaluation(self, part: str, names: tuple[str, ...], device: torch.device) -> dict[str, Batches]:
        """Return fixed batches of the "in", "out" or "test" split of some domains."""
        rows = {"in": self.inside, "out": self.outside, "test": self.tested}[part]
        return {name: batches.evaluation_batches(self.data, name, rows[name], device=device) for name in names}

    def calibration(self, count: int, device: torch.device) -> list[Batches]:
        """Return batches of the first `count` training images of each source domain (fewer where it has fewer)."""
        load = partial(batches.evaluation_batches, self.data, device=device, batch_size=64, limit=count)
        return [load(name, self.inside[name]) for name in self.sources]


def domains(spec: RunSpec, place: Place) -> Domains:
    """Load (once in a process) and split the data of a run."""
    data = _load(spec.dataset, place.data_dir, spec.image_size, place.cache)
    shares = {"fraction": spec.holdout, "tested": spec.test_share}
    splits = {
        name: split(len(data.domain(name).labels), index, trial_seed=spec.trial_seed, **shares)
        for index, name in enumerate(data.names)
    }
    target = choose("held-out domain", spec.held_out, data.names)
    seen = {name: part for name, part in splits.items() if name != target}
    reported = np.concatenate([splits[target].inside, splits[target].tested])  # an in-domain test needs none of it
    return Domains(
        data=data,
        target=target,
        inside={name: seen[name].inside if name in seen else reported for name in splits},
        outside={name: part.outside for name, part in splits.items()},
        tested={name: part.tested for name, part in seen.items() if len(part.tested)},
    )


@lru_cache(maxsize=2)
def _load(dataset: str, data_dir: str | None, image_size: int, cache: str | None) -> DomainSet:
    folder, kept = (Path(each) if each else None for each in (data_dir, cache))
    return sources.load(dataset, data_dir=folder, image_size=image_size, cache=kept)


def network(spec: RunSpec, data: DomainSet, place: Place) -> Network:
    """Return the initialised full-precision network of a run, on the device."""
    built = build_network(
        spec.model,
        num_classes=len(data.classes),
        in_channels=data.domains[0].images.shape[1],
        weights=_weights(spec, place),
        seed=spec.seed,
    )
    return built.to(device(place))


def finished(spec: RunSpec, data: DomainSet, place: Place) -> Network | Ensemble:
    """Return the network that a run ends with, to load a checkpoint into: quantizer attached, an ensemble's members."""
    if spec.members:
        return Ensemble([finished(member, data, place) for member in spec.members], combine=spec.combine)
    built = network(spec.replace(weights="none"), data, place)  # the checkpoint holds all weights
    quantize(built, spec)
    return built


def _weights(spec: RunSpec, place: Place) -> str | Path:
    if not spec.weights.startswith("sha256:"):
        return spec.weights
    if place.weights_file is None:
        raise UserError(f"This run starts from a weights file ({spec.weights[:19]}...); name it with --weights FILE.")
    if f"sha256:{file_hash(Path(place.weights_file))}" != spec.weights:
        raise UserError(f"{place.weights_file} is not the weights file that this run names ({spec.weights[:19]}...).")
    return Path(place.weights_file)


def quantize(built: Network, spec: RunSpec) -> list[nn.Parameter]:
    """Attach the spec's quantizer to a network; return its step sizes (none where it has none to learn).

    What post-training quantization leaves behind is attached empty, to be loaded or settled.
    """
    match spec.quantizer:
        case None:
            return []
        case QuantSpec() as q:
            attach.attach(built, **q.model_dump(include={"bits", "granularity", "grad_scale", "signed", "log_scale"}))
            if q.activations != "none":
                attach.attach_activations(built, bits=q.activation_bits, signed=q.activations == "signed")
        case INQSpec() as q:
            grid = q.model_dump(include={"bits", "granularity", "grid"})
            attach.attach_each(built, lambda _, weight, axis: INQ(weight, axis=axis, **grid))
        case q:
            kind = q.model_dump(include={"bits", "granularity"})
            attach.attach_each(built, lambda _, weight, axis: Fixed.empty(weight, axis=axis, **kind))
    return list(attach.scales(built).values())


def roles(built: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Sort the parameters by role: weights (of convolutions and the like), norms, scales (step sizes), head."""
    step_sizes = {id(scale) for scale in attach.scales(built).values()}
    sorted_: dict[str, dict[str, nn.Parameter]] = {"weights": {}, "norms": {}, "scales": {}, "head": {}}
    for name, parameter in built.named_parameters():
        if id(parameter) in step_sizes:
            sorted_["scales"][name] = parameter
        elif name.startswith("head."):
            sorted_["head"][name] = parameter
        else:
            sorted_["weights" if parameter.ndim > 1 else "norms"][name] = parameter
    return sorted_


def load(built: nn.Module, weights: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Load a checkpoint's arrays into a network built from the same spec.

    Args:
        built: the network, its quantizer attached where the run has one.
        weights: arrays by parameter name.

    Raises:
        UserError: where names or shapes do not fit.
    """
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    try:
        built.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"The checkpoint is of another architecture than its spec says: {reason}") from None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with so many threads, and with as many as before afterwards: the process is the caller's."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device(place: Place) -> torch.device:
    """Return the device: as named, or for "auto" the best of cuda, mps, cpu.

    Args:
        place: names it.

    Raises:
        UserError: where the name is none, or the device is absent.
    """
    if place.device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        named = torch.device(place.device)
        torch.empty(1, device=named)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"The device {place.device!r} is not to be had here; choose auto, cpu, cuda or mps.") from None
    return named
