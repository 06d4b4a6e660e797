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

from flatlab.data import batches, catalog
from flatlab.data import load as data_load
from flatlab.data.domains import DomainSet, shuffled, split
from flatlab.data.text.sets import TextSet
from flatlab.data.text.tokenizers import Tokenizer
from flatlab.errors import UserError, choose
from flatlab.models import saved
from flatlab.models.classifiers import settings_of
from flatlab.specs.run import Place, RunSpec
from flatlab.tensors.precision import float32_in_full

Rows = dict[str, npt.NDArray[np.int64]]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Domains:
    """The data of a run: source domains, held-out domain, and the split of each domain, or the named splits."""

    data: DomainSet
    target: str
    in_: Rows  # "in" split, 80 %: training (sources), reported accuracy (target)
    out: Rows  # "out" split, 20 %: validation
    test: Rows  # "test" split of the sources; may be empty

    @property
    def sources(self) -> tuple[str, ...]:
        """The source domains."""
        return tuple(name for name in self.in_ if name != self.target)

    @property
    def validated(self) -> tuple[str, ...]:
        """The domains on whose "out" split checkpoints are selected: the source domains, or a named split."""
        return tuple(name for name in self.out if name != self.target)

    @property
    def groups(self) -> dict[str, Tensor]:
        """The group of each row of a named split; empty where rows have none."""
        rows, found = {**self.in_, **self.out, **self.test}, {}
        for domain in self.data.domains:
            if domain.groups is not None and domain.name in rows:
                found[domain.name] = domain.groups[torch.from_numpy(rows[domain.name])]
        return found

    def measured(self, part: str) -> Rows:
        """Return the "in" or "out" split of all domains.

        Raises:
            UserError: the held-out one has no "out" split, since the splits are named.
        """
        rows = self.in_ if part == "in" else self.out
        if self.target not in rows:
            raise UserError(
                f'The named split {self.target} of {self.data.name} has one part, got split="{part}": write split="in".'
            )
        return rows

    def evaluation(self, part: str, names: tuple[str, ...], device: torch.device) -> dict[str, Batches]:
        """Return fixed batches of the "in", "out" or "test" split of some domains."""
        rows = {"in": self.in_, "out": self.out, "test": self.test}[part]
        return {name: batches.evaluation_batches(self.data, name, rows[name], device=device) for name in names}

    def calibration(self, count: int, device: torch.device) -> list[Batches]:
        """Return batches of the first `count` training images of each source domain (all if it has fewer)."""
        load = partial(batches.evaluation_batches, self.data, device=device, batch_size=64, limit=count)
        return [load(name, self.in_[name]) for name in self.sources]


def domains(spec: RunSpec, place: Place) -> Domains:
    """Load (once in a process) and split the data of a run."""
    data = _load(spec.dataset, place.data_dir, spec.image_size, place.cache)
    target = choose("held-out domain", spec.held_out, data.names)
    known = catalog.facts(spec.dataset)
    named = bool(known and known.held_out)
    if isinstance(data, TextSet) and spec.saved:
        data = _cut(data, saved.checked(spec.model, place.model_dir))
    elif isinstance(data, TextSet):
        data = _seen(data, ("train",) if named else tuple(name for name in data.names if name != target))
    if spec.corruption:
        data = _corrupted(data, spec.corruption, target)
    if named:
        return _named(data, target)
    splits = {
        name: split(
            len(data.domain(name).labels),
            index,
            trial_seed=spec.trial_seed,
            fraction=spec.holdout,
            test=0.0 if name == target else spec.test_share,  # the target has no test split
        )
        for index, name in enumerate(data.names)
    }
    return Domains(
        data=data,
        target=target,
        in_={name: part.in_ for name, part in splits.items()},
        out={name: part.out for name, part in splits.items()},
        test={name: part.test for name, part in splits.items() if len(part.test)},
    )


def _named(data: DomainSet, target: str) -> Domains:
    """Return the named splits of WILDS: train, val for selection, and in distribution the test or else the val one."""
    rows = {name: np.array(shuffled(len(data.domain(name)), 0, index)) for index, name in enumerate(data.names)}
    inner = "id_test" if "id_test" in rows else "id_val"
    return Domains(
        data=data,
        target=target,
        in_={"train": rows["train"], target: rows[target]},
        out={"val": rows["val"]},
        test={inner: rows[inner]},
    )


@lru_cache(maxsize=2)
def _corrupted(data: DomainSet, corruption: str, target: str) -> DomainSet:
    from flatlab.data.corruptions import with_corrupted  # here: scipy.ndimage takes a third of a second to load

    return with_corrupted(data, corruption, target)


@lru_cache(maxsize=4)
def _seen(data: TextSet, sources: tuple[str, ...]) -> TextSet:
    return data.seen_from(sources)


@lru_cache(maxsize=2)
def _cut(data: TextSet, folder: Path) -> TextSet:
    settings = settings_of(json.dumps(saved.config_of(folder)))
    return data.cut_by(Tokenizer(folder, rows=settings.vocab_size, padding=settings.pad_token_id))


@lru_cache(maxsize=2)
def _load(dataset: str, data_dir: str | None, image_size: int, cache: str | None) -> DomainSet:
    return data_load.load(dataset, data_dir=_path(data_dir), image_size=image_size, cache=_path(cache))


def _path(given: str | None) -> Path | None:
    return Path(given) if given else None


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """Compute with this number of threads, and float32 in full, while the block runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with float32_in_full():
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
