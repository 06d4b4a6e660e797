"""A run's data and machine: its domains and splits, the device and the threads."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.data import batches
from flatlab.data import load as data_load
from flatlab.data.domains import DomainSet, split
from flatlab.data.text.sets import TextSet
from flatlab.data.text.tokenizers import Tokenizer
from flatlab.errors import UserError, choose
from flatlab.models import saved
from flatlab.models.classifiers import settings_of
from flatlab.specs.run import Place, RunSpec

Rows = dict[str, npt.NDArray[np.int64]]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Domains:
    """The data of a run: source domains, held-out domain, and the split of each domain."""

    data: DomainSet
    target: str
    inside: Rows  # "in" split, 80 %: training (sources), reported accuracy (target)
    outside: Rows  # "out" split, 20 %: validation
    tested: Rows  # "test" split of the sources; may be empty

    @property
    def sources(self) -> tuple[str, ...]:
        """The source domains."""
        return tuple(name for name in self.data.names if name != self.target)

    def evaluation(self, part: str, names: tuple[str, ...], device: torch.device) -> dict[str, Batches]:
        """Return fixed batches of the "in", "out" or "test" split of some domains."""
        rows = {"in": self.inside, "out": self.outside, "test": self.tested}[part]
        return {name: batches.evaluation_batches(self.data, name, rows[name], device=device) for name in names}

    def calibration(self, count: int, device: torch.device) -> list[Batches]:
        """Return batches of the first `count` training images of each source domain (all if it has fewer)."""
        load = partial(batches.evaluation_batches, self.data, device=device, batch_size=64, limit=count)
        return [load(name, self.inside[name]) for name in self.sources]


def domains(spec: RunSpec, place: Place) -> Domains:
    """Load (once in a process) and split the data of a run."""
    data = _load(spec.dataset, place.data_dir, spec.image_size, place.cache)
    target = choose("held-out domain", spec.held_out, data.names)
    if isinstance(data, TextSet) and spec.saved:
        data = _cut(data, saved.checked(spec.model, place.model_dir))
    elif isinstance(data, TextSet):
        data = _seen(data, tuple(name for name in data.names if name != target))
    splits = {
        name: split(
            len(data.domain(name).labels),
            index,
            trial_seed=spec.trial_seed,
            fraction=spec.holdout,
            tested=0.0 if name == target else spec.test_share,  # the target has no test split
        )
        for index, name in enumerate(data.names)
    }
    return Domains(
        data=data,
        target=target,
        inside={name: part.inside for name, part in splits.items()},
        outside={name: part.outside for name, part in splits.items()},
        tested={name: part.tested for name, part in splits.items() if len(part.tested)},
    )


@lru_cache(maxsize=4)
def _seen(data: TextSet, sources: tuple[str, ...]) -> TextSet:
    return data.seen_from(sources)


@lru_cache(maxsize=2)
def _cut(data: TextSet, folder: Path) -> TextSet:
    settings = settings_of(json.dumps(saved.config_of(folder)))
    return data.cut_by(Tokenizer(folder, rows=settings.vocab_size, padding=settings.pad_token_id))


@lru_cache(maxsize=2)
def _load(dataset: str, data_dir: str | None, image_size: int, cache: str | None) -> DomainSet:
    folder, kept = (Path(each) if each else None for each in (data_dir, cache))
    return data_load.load(dataset, data_dir=folder, image_size=image_size, cache=kept)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads while the block runs, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device(place: Place) -> torch.device:
    """Return the device: as named, or for "auto" the better of cuda and cpu.

    Raises:
        UserError: if the name is unknown, or the device is not available.
    """
    if place.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if place.device.startswith("mps"):
        raise UserError("The device must have float64, for exact sums, but mps has not: choose auto, cpu or cuda.")
    try:
        named = torch.device(place.device)
        torch.empty(1, device=named)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"The device {place.device!r} is not available; choose auto, cpu or cuda.") from None
    return named
