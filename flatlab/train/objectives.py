"""Objectives: functions from a network, a batch and its step to a scalar loss (nats); the pretraining of digits-clip.

That pretraining trains an image tower and a caption tower together on the source domains. The caption of an image is
its class and domain, such as "a 7 of rot30". The loss is CLIP's in both directions, with all equal captions of a batch
as positives (UniCL, Yang et al. 2022). Afterwards the caption tower is discarded: each row of the head is the mean of a
class's caption vectors over the source domains, normalised, and stays frozen.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from flatlab.data.batches import Batch
from flatlab.errors import UserError
from flatlab.loading.data import Domains
from flatlab.models.networks import STAGES, Network
from flatlab.models.small import CaptionTower
from flatlab.seeds import derive, seeded
from flatlab.specs.run import RunSpec
from flatlab.train.batches import stream
from flatlab.train.mixstyle import mixing

Objective = Callable[[Network, Batch, int], Tensor]


def objective_of(spec: RunSpec) -> Objective:
    """Return the objective of a spec; MixStyle's draws are functions of seed and step, as batches are.

    Raises:
        UserError: MixStyle with a model that has no convolutional stages.
    """
    losses: dict[str, Callable[[Network, Batch], Tensor]] = {
        "erm": erm,
        "coral": partial(coral, weight=spec.coral_weight),
        "mms": partial(margin_softmax, margin=spec.margin),
    }
    loss = losses[spec.objective]
    mix, stages = spec.mixing, STAGES.get(spec.model, ())
    if mix and not stages:
        raise UserError(f"MixStyle needs a convolutional model, got {spec.model}: write --mixing none.")

    def objective(network: Network, batch: Batch, step: int) -> Tensor:
        with mixing(network, stages, mix, names=(spec.seed, step), sizes=batch.sizes) if mix else nullcontext():
            return loss(network, batch)

    return objective


def erm(network: Network, batch: Batch) -> Tensor:
    """Return the mean cross-entropy (nats) over the batch, the images of all source domains."""
    return F.cross_entropy(network(batch.inputs).float(), batch.targets)  # in float32 where logits are bf16


def margin_softmax(network: Network, batch: Batch, *, margin: float) -> Tensor:
    """Return CLIPood's margin metric softmax (Shu et al. 2023), as its released code has it.

    Each feature is shifted against its own class's vector, by `margin` times its length, before the cross-entropy. For
    CLIP, whose class vectors t have length one and whose features have that of the temperature T, the logit of a class
    c falls by margin T t_y t_c. Vectors of another length are normalised for the shift.

    Args:
        network: the rows of its head are the class vectors.
        batch: of the source domains.
        margin: as a share of a feature's length.
    """
    features = network.features(batch.inputs)
    own = F.normalize(network.head.weight[batch.targets], dim=-1)
    shifted = features - margin * features.norm(dim=-1, keepdim=True) * own
    return F.cross_entropy(network.head(shifted).float(), batch.targets)


def coral(network: Network, batch: Batch, *, weight: float = 1.0) -> Tensor:
    """Return the cross-entropy plus `weight` times CORAL's penalty (Sun and Saenko 2016, as in khanrc/swad).

    Args:
        network: the network whose features are aligned.
        batch: at least two images of each source domain.
        weight: factor of the penalty.
    """
    features = network.features(batch.inputs)
    loss = F.cross_entropy(network.head(features).float(), batch.targets)
    return loss + weight * alignment(features.float().split(batch.sizes))


def alignment(domains: Sequence[Tensor]) -> Tensor:
    """Return the mean over pairs of domains of the mean squared difference of means and of covariances.

    Args:
        domains: features (n_d, width) of each domain; the penalty of a single domain is 0.
    """
    moments = [(each.mean(0), torch.cov(each.T)) for each in domains]
    pairs = [F.mse_loss(m, n) + F.mse_loss(c, d) for (m, c), (n, d) in combinations(moments, 2)]
    return torch.stack(pairs).mean() if pairs else domains[0].new_zeros(())


def contrast(network: Network, spec: RunSpec, domains: Domains, device: torch.device) -> None:
    """Train the image tower with a caption tower, in place, and write the class vectors to the head.

    Args:
        network: digits-clip, whose features are in the space of captions.
        spec: the run; its number of steps, batch size and learning rate are used.
        domains: the run's data; the training images of the source domains are used.
        device: device of the network.
    """
    captions = _numbers([f"a {one} of {name}" for name in domains.sources for one in domains.data.classes]).to(device)
    count = len(domains.data.classes)
    with seeded("captions", spec.seed):
        tower = CaptionTower(int(captions.max()) + 1, captions.shape[1]).to(device)
    optimizer = torch.optim.Adam([*network.features.parameters(), *tower.parameters()], lr=spec.lr)
    batches = stream(spec.replace(seed=derive("contrast", spec.seed) % 2**31), domains, device)
    network.train()
    for step in range(spec.steps + 1):
        batch = batches.batch(step)
        optimizer.zero_grad()
        loss = _loss(network.features(batch.inputs), tower(captions), _captioned(batch, count))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        vectors = tower(captions).unflatten(0, (-1, count)).mean(0)
        network.head.weight.copy_(F.normalize(vectors, dim=-1))


def _numbers(captions: list[str]) -> Tensor:
    """Return ids of the captions' characters (N, T), padded with 0."""
    known = {each: index for index, each in enumerate(sorted({*"".join(captions)}), 1)}
    length = max(map(len, captions))
    return torch.tensor([[known[each] for each in text] + [0] * (length - len(text)) for text in captions])


def _captioned(batch: Batch, classes: int) -> Tensor:
    """Return the index of each image's caption (B,): by domain in the order of the batch, then by class."""
    domain = torch.arange(len(batch.sizes)).repeat_interleave(torch.tensor(batch.sizes))
    domain = domain.to(batch.targets.device, non_blocking=True)
    return domain * classes + batch.targets


def _loss(images: Tensor, vectors: Tensor, captions: Tensor) -> Tensor:
    """Return the mean cross-entropy over both directions.

    Args:
        images: (B, D), unit vectors times the inverse temperature.
        vectors: (M, D), unit vectors of all captions.
        captions: (B,), the index of each image's caption.
    """
    logits = images @ vectors[captions].T
    same = (captions[:, None] == captions[None]).float()
    positives = same / same.sum(1, keepdim=True)  # symmetric: rows of equal captions have equal sums
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2
