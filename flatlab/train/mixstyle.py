"""MixStyle (Zhou et al. 2021): an image's feature statistics, mixed with those of another image of the batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flatlab.errors import UserError
from flatlab.seeds import derive
from flatlab.specs.run import MixSpec

EPS = 1e-6  # under the root of the variance, as khanrc/swad


@contextmanager
def mixing(
    network: nn.Module,
    stages: Sequence[str],
    spec: MixSpec,
    *,
    names: tuple[int, ...],
    sizes: Sequence[int] = (),
) -> Iterator[None]:
    """Mix the outputs of some modules while the block runs; the network holds no layer of it and no hook afterwards.

    Args:
        network: in training.
        stages: names of the modules.
        spec: how often and how much.
        names: seed and step: the same ones give the same draws, so that both passes of SAM are of one function.
        sizes: images of each domain in a batch, for mixing across domains.

    Raises:
        UserError: where domains are to be mixed, and there is one alone.
    """
    if spec.across and len(sizes) < 2:
        raise UserError(f"Mixing across domains needs two source domains, and there are {len(sizes)}; take mixstyle.")
    with ExitStack() as stack:
        for stage in stages:
            rng = np.random.default_rng(derive("mixstyle", *names, stage))
            if rng.random() < spec.p:
                hook = network.get_submodule(stage).register_forward_hook(_mixer(spec, rng, sizes))
                stack.callback(hook.remove)
        yield


def _mixer(
    spec: MixSpec, rng: np.random.Generator, sizes: Sequence[int]
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def mixed(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        del module, inputs
        share = rng.beta(spec.alpha, spec.alpha, size=len(outputs))
        partners = strangers(sizes, rng) if spec.across else rng.permutation(len(outputs))
        return mix(outputs, torch.from_numpy(partners), torch.from_numpy(share))

    return mixed


def strangers(sizes: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return for each image another one, of another domain (Zhou et al. 2021, Fig. 2b).

    The paper has two domains in a batch, and the images of one meet those of the other, shuffled. Of more, the domains
    are moved round by a random number of places: where they are equally large, the result is a permutation.

    Args:
        sizes: images of each domain, which lie one after the other.
        rng: draws.
    """
    starts, shift = np.cumsum([0, *sizes]), int(rng.integers(1, len(sizes)))
    shuffled = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=False)]
    others = [shuffled[(index + shift) % len(sizes)] for index in range(len(sizes))]
    return np.concatenate([np.resize(other, size) for other, size in zip(others, sizes, strict=True)])


def mix(features: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Return features with the mean and deviation of each channel drawn towards a partner's.

    Args:
        features: (N, C, H, W).
        partners: (N,) which image lends its statistics to which.
        share: (N,) of an image's own statistics; 1 leaves it as it is.

    Returns:
        (N, C, H, W); gradients do not flow through the statistics.
    """
    mean = features.mean((2, 3), keepdim=True).detach()
    deviation = (features.var((2, 3), keepdim=True) + EPS).sqrt().detach()
    partners = partners.to(features.device)
    own = share.to(features).view(-1, 1, 1, 1)
    mixed_mean, mixed_deviation = (own * s + (1 - own) * s[partners] for s in (mean, deviation))
    return (features - mean) / deviation * mixed_deviation + mixed_mean
