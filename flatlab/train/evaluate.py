"""Accuracy and loss of each domain, averaged over its images; and the rows of a log."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flatlab.loading.data import Batches, Domains
from flatlab.specs.run import RunSpec
from flatlab.store.selection import Row
from flatlab.tensors.memory import SplitOnOOM

Score = dict[str, float]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    domains: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
    *,
    percentile: float | None = None,
    groups: Mapping[str, Tensor] | None = None,
) -> dict[str, Score]:
    """Return accuracy (0 to 1), mean cross-entropy (nats) and number of images `n` of each domain, in eval mode.

    Args:
        network: returns logits; its training modes are restored.
        domains: batches (inputs, targets) by the domain's name.
        percentile: if given, also return this percentile (0 to 100, interpolated linearly) of the accuracies of a
            domain's classes, as `class_percentile`.
        groups: by the domain's name, the group (n,) of each row, in place of its class.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    forward = SplitOnOOM(network)
    known = groups or {}
    with parametrize.cached():  # weights are quantized once, not for each batch
        scores = {name: _score(forward, batches, percentile, known.get(name)) for name, batches in domains.items()}
    for module, training in modes:  # one by one: frozen BatchNorm stays in eval mode while the rest trains
        module.training = training
    return scores


def _score(
    forward: SplitOnOOM,
    batches: Sequence[tuple[Tensor, Tensor]],
    percentile: float | None,
    groups: Tensor | None = None,
) -> Score:
    losses, hits, classes = [], [], []
    for inputs, targets in batches:
        logits = forward(inputs)
        losses.append(F.cross_entropy(logits, targets, reduction="none").cpu().double())
        hits.append((logits.argmax(dim=1) == targets).cpu())
        classes.append(targets.cpu())
    hit, label = torch.cat(hits).double(), torch.cat(classes) if groups is None else groups
    score = {"accuracy": float(hit.mean()), "loss": float(torch.cat(losses).mean()), "n": len(hit)}
    if percentile is not None:
        each = torch.stack([hit[label == one].mean() for one in torch.unique(label)])
        score["class_percentile"] = float(each.quantile(percentile / 100))
    return score


def mean(scores: Mapping[str, Score], field: str) -> float:
    """Return the unweighted mean of a field over domains."""
    return sum(score[field] for score in scores.values()) / len(scores)


class Evaluator:
    """Evaluates networks on the splits that selection and reports need; the batches are made once.

    If rows have groups and a percentile of their accuracies is asked for, that selects, as in WILDS' code; else the
    accuracy does.
    """

    def __init__(self, domains: Domains, device: torch.device, spec: RunSpec, *, fitted: bool = False) -> None:
        """Make the batches: of the target domain if the spec logs it, of the training images if `fitted`."""
        groups = domains.groups
        if domains.target in groups:
            groups["in"] = groups[domains.target]
        self._evaluate = partial(evaluate, percentile=spec.class_percentile, groups=groups)
        self._selecting = "class_percentile" if groups and spec.class_percentile is not None else "accuracy"
        self.fitted = domains.evaluation("in", domains.sources, device) if fitted else {}
        self.validation = domains.evaluation("out", domains.validated, device)
        self.test = domains.evaluation("test", tuple(domains.test), device)
        self.target: dict[str, Batches] = {
            part: domains.evaluation(part, (domains.target,), device)[domains.target]
            for part in (("in", "out") if spec.target_logged else ())
            if part == "in" or domains.target in domains.out
        }

    def sources(self, network: nn.Module) -> dict[str, Score]:
        """Return the scores on the validation split of each source domain."""
        return self._evaluate(network, self.validation)

    def row(self, network: nn.Module, step: int, sources: dict[str, Score] | None = None) -> Row:
        """Return a row of the log: validation scores and, where they are evaluated, those of the other splits."""
        sources = sources or self.sources(network)
        tested = self._evaluate(network, self.test)
        fitted = self._evaluate(network, self.fitted)
        return {
            **({"fitted": fitted} if fitted else {}),
            **({"test": tested} if tested else {}),
            "step": step,
            "source": sources,
            **({"target": self._evaluate(network, self.target)} if self.target else {}),
            "validation": mean(sources, self._selecting),
            "validation_loss": mean(sources, "loss"),
        }
