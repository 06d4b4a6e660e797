"""Images in named domains, as bytes, and DomainBed's fixed split of each domain."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from flatlab.data.images import Decoded, Originals
from flatlab.errors import UserError, choose, count_of
from flatlab.seeds import seed_hash


@dataclass(frozen=True, eq=False)
class Domain:
    """One domain's images and labels.

    Attributes:
        name: name of the domain.
        images: (N, C, H, W) uint8; indexing by rows returns a tensor, also if the images are decoded on access.
        labels: (N,) int64, indices into the data set's classes.
        originals: the images in their own aspect ratios, from which training crops are taken; None: `images`.
        groups: (N,) int64, the number of each one's group (a reviewer, a hospital); None: there are none.
    """

    name: str
    images: torch.Tensor | Decoded
    labels: torch.Tensor
    originals: Originals | None = None
    groups: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DomainSet:
    """A data set: its domains in index order, which share their classes and one normalisation.

    Attributes:
        name: name of the data set.
        domains: in index order.
        classes: the classes' names, in label order.
        mean: mean of each channel, for images scaled to [0, 1].
        std: standard deviation of each channel, on the same scale.
        stamp: the fingerprint of the files that the images were decoded from; None if there are none.
    """

    name: str
    domains: tuple[Domain, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stamp: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The domains' names in index order."""
        return tuple(domain.name for domain in self.domains)

    def index(self, name: str) -> int:
        """Return the index of a domain, by its name."""
        return self.names.index(choose("domain", name, self.names))

    def domain(self, name: str) -> Domain:
        """Return a domain, by its name."""
        return self.domains[self.index(name)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, classes, image bytes and labels, equal for equal data.

        For images from files the files' bytes are hashed, which do not depend on decoder or image size.
        """
        if self.stamp:
            return self.stamp
        digest = hashlib.sha256(repr((self.name, self.classes)).encode())
        for domain in self.domains:
            digest.update(repr((domain.name, tuple(domain.images.shape))).encode())
            assert isinstance(domain.images, torch.Tensor)
            for tensor in (domain.images, domain.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, C, H, W) bytes as float32 inputs, (x / 255 - mean) / std, channels last.

        A CPU's convolutions are 2.3 times faster in that memory format (measured); values and shape are the same.
        """
        inputs = images.to(torch.float32, copy=True, memory_format=torch.channels_last)
        mean, std = (inputs.new_tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return inputs.div_(255).sub_(mean).div_(std)


class Split(NamedTuple):
    """Row numbers of one domain, in a seeded order.

    Attributes:
        in_: (n_in,) int64, DomainBed's "in" split: trains a source, tests a target.
        out: (n_out,) int64, DomainBed's "out" split: validates.
        test: (n_test,) int64, for an in-domain test: cut off the "out" split.
    """

    in_: np.ndarray
    out: np.ndarray
    test: np.ndarray


def split(n: int, domain_index: int, *, trial_seed: int, fraction: float = 0.2, test: float = 0.0) -> Split:
    """Split the `n` images of a domain exactly as DomainBed does, and its "out" split again as SWAD does.

    Source: facebookresearch/DomainBed, scripts/train.py and lib/misc.py; khanrc/swad, trainer.py (`indomain_test`).

    Args:
        n: number of images in the domain.
        domain_index: the domain's place in index order; each domain is shuffled by its own seed.
        trial_seed: seed of the split.
        fraction: share of the images for validation, rounded down.
        test: share of the images for an in-domain test.

    Raises:
        UserError: if one of the parts would be empty.
    """
    n_out = int(n * (fraction + test))
    n_validate = int(n_out * (fraction / (fraction + test)))
    if not 0 < n_validate <= n_out < n or (test and n_validate == n_out):
        which = f"Domain {domain_index} has {count_of(n, 'image')}"
        raise UserError(
            f"{which}: shares of {fraction} and {test} leave {n_validate} to validate on, "
            f"{n_out - n_validate} to test on and {n - n_out} to train on; each part needs at least one image."
            if test
            else f"{which}: a share of {fraction} leaves {n_out} to validate on and {n - n_out} to train on; "
            "both parts need at least one image."
        )
    keys, places = shuffled(n, trial_seed, domain_index), list(range(n_out))
    if test:
        places = shuffled(n_out, trial_seed, domain_index)
    outer = np.array(keys[:n_out], dtype=np.int64)[places]
    return Split(np.array(keys[n_out:], dtype=np.int64), outer[:n_validate], outer[n_validate:])


def shuffled(n: int, trial_seed: int, domain_index: int) -> list[int]:
    """Return the numbers below `n` in DomainBed's order of a domain."""
    keys = list(range(n))
    np.random.RandomState(seed_hash(trial_seed, domain_index)).shuffle(keys)
    return keys


def numbered(groups: Sequence[str]) -> torch.Tensor | None:
    """Return the number of each one's group by name; None if there are no groups."""
    return torch.from_numpy(np.unique(np.array(groups), return_inverse=True)[1]) if groups else None
