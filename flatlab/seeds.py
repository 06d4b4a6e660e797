"""Seeds derived from names.

A draw is identified by its purpose ("batches", seed, domain, step), so that adding a metric or a domain changes
no other draws, and a resumed run needs no saved generator.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(*names: object) -> int:
    """Return the seed in [0, 2**63) derived from these names."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


def generator(*names: object, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """Return a fresh generator seeded by these names."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(*names))


@contextmanager
def seeded(*names: object, device: "torch.device | None" = None) -> Iterator[None]:
    """Seed torch's global generators by these names while the block runs, and restore their states.

    Args:
        names: as for `derive`.
        device: device of the computation; a CUDA device's generator is seeded, too.
    """
    import torch

    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # Not torch.manual_seed, which would reseed the generators of all accelerators.
        torch.default_generator.manual_seed(derive(*names))
        for each in cuda:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(derive(*names))
        yield


@contextmanager
def undisturbed(*devices: "torch.device") -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch after the block: what it reads or imports may draw.

    Args:
        devices: accelerators of one kind, whose generators are restored, too.
    """
    import numpy as np
    import torch

    python, state = random.getstate(), np.random.get_state()
    kind = devices[0].type if devices else "cuda"
    try:
        with torch.random.fork_rng(devices=[each.index or 0 for each in devices], device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(state)


def base_seed(seed: "int | torch.Generator") -> int:
    """Return `seed` itself, or one integer drawn from it if it is a generator."""
    import torch

    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (), generator=seed, device=seed.device))
    return int(seed)


def seed_hash(*args: object) -> int:
    """Return DomainBed's seed for these arguments: md5 of the printed tuple, modulo 2**31.

    Source: facebookresearch/DomainBed, lib/misc.py; `seed_hash(0, 1)` hashes the string "(0, 1)".
    """
    return int(hashlib.md5(str(args).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31
