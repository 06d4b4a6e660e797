"""MixStyle (Zhou et al. 2021): feature statistics of an image, mixed with those of another image of the batch."""

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
    """Context in which the outputs of some modules are mixed, by hooks that are removed at its end.

    Args:
        network: the network, in training mode.
        stages: names of the modules.
        spec: probability and strength.
        names: seed and step, which determine the draws, so that both passes of SAM evaluate the same function.
        sizes: number of images of each domain in a batch, for mixing across domains.

    Raises:
        UserError: mixing across domains with a single source domain.
    """
    if spec.across and len(sizes) < 2:
        raise UserError(f"--mixing mixstyle-across needs at least 2 source domains, got {len(sizes)}: take mixstyle.")
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
        partners = cross_domain_partners(sizes, rng) if spec.across else rng.permutation(len(outputs))
        return mix(outputs, torch.from_numpy(partners), torch.from_numpy(share))

    return mixed


def cross_domain_partners(sizes: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return for each image the index of a partner of another domain (Zhou et al. 2021, Fig. 2b), shape (N,).

    The paper has two domains in a batch and pairs the images of one with shuffled ones of the other. With more, the
    domains are rotated by a random offset; if they have equally many images, the result is a permutation.

    Args:
        sizes: number of images of each domain; the domains are consecutive in the batch.
        rng: random generator.
    """
    starts, shift = np.cumsum([0, *sizes]), int(rng.integers(1, len(sizes)))
    shuffled = [start + rng.permutation(size) for start, size in zip(starts, sizes, strict=False)]
    others = [shuffled[(index + shift) % len(sizes)] for index in range(len(sizes))]
    return np.concatenate([np.resize(other, size) for other, size in zip(others, sizes, strict=True)])


def mix(features: Tensor, partners: Tensor, share: Tensor) -> Tensor:
    """Return features whose channel means and standard deviations are interpolated with those of partners.

    Args:
        features: (N, C, H, W).
        partners: (N,), the index of each image's partner.
        share: (N,), weight of an image's own statistics; 1 leaves the image unchanged.

    Returns:
        (N, C, H, W); the statistics are constants to autograd.
    """
    mean = features.mean((2, 3), keepdim=True).detach()
    deviation = (features.var((2, 3), keepdim=True) + EPS).sqrt().detach()
    partners = partners.to(features.device, non_blocking=True)
    own = share.to(features, non_blocking=True).view(-1, 1, 1, 1)
    mixed_mean, mixed_deviation = (own * s + (1 - own) * s[partners] for s in (mean, deviation))
    return (features - mean) / deviation * mixed_deviation + mixed_mean
