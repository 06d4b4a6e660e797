"""A run's data and machine: its domains and splits, the device and the threads."""

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
from flatlab.errors import UserError, choose
from flatlab.specs.run import Place, RunSpec

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
        """The source domains."""
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
    return data_load.load(dataset, data_dir=folder, image_size=image_size, cache=kept)


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
