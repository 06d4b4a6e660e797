"""The loss that a model computes from its labels, divided among the samples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab.errors import UserError
from flatlab.landscape.failures import model_explained
from flatlab.tensors.calls import innermost
from flatlab.tensors.nested import Batch, tensors
from flatlab.tensors.structures import entry

Pair = tuple[Tensor, Tensor]
IGNORED = -100  # the label that is ignored, in torch and in transformers
CLOSE, CLOSE_IN_16_BITS = 1e-4, 1e-2  # models compute their loss in float32, some in the dtype of their weights


def loss_of(model: nn.Module) -> "OwnLoss":
    """Return the loss that a model computes from its labels, for a landscape whose batches have ``labels``.

    A mean over tokens does not depend on the batches: each counted token has the same weight, so the weight of a sample
    is its number of tokens; tokens labelled -100 are not counted. The loss is identified by comparison with that
    returned for the first batch and for samples of several: cross-entropy of classes, of tokens or of next tokens,
    binary cross-entropy, or squared error. ``landscape.remarks`` states the weights of samples, if these differ.

    Args:
        model: returns ``logits`` and, given ``labels``, ``loss``; as the models of transformers do.
    """
    return OwnLoss(model)


class OwnLoss:
    """A function of outputs and labels that returns each sample's sum of losses and its weight; see `loss_of`.

    Attributes:
        kind: the name of the loss; empty until a landscape has compared it with the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.kind = model, ""

    def __call__(self, outputs: Any, labels: Tensor) -> Pair:
        """Return the sums and weights (n,) of a batch's samples."""
        if not self.kind:
            raise UserError("Pass loss_of(model) to a Landscape, which compares it with the model's own loss.")
        found = KINDS[self.kind](_logits(outputs), labels)
        if found is None:
            raise UserError(f"Labels of shape {tuple(labels.shape)} and {labels.dtype} are not those of {self.kind}.")
        return found

    def settle(self, batches: Sequence[Batch]) -> None:
        """Identify the loss that the model returns, on some batches: one of a single class has no class weights.

        Raises:
            UserError: if it returns none, or one that is not known.
        """
        kinds = [self._kind_of(batch.inputs, batch.targets) for batch in batches]
        self.kind = next((kind for kind in kinds[0] if all(kind in others for others in kinds)), "")
        if not self.kind:
            listed = "; ".join(dict.fromkeys(" or ".join(each) for each in kinds))
            raise UserError(
                f"The loss that {type(innermost(self.model)).__name__} returns is of one kind for some batches, and of"
                f" another for others ({listed}): pass your own loss(outputs, targets)."
            )

    def _kind_of(self, inputs: Any, labels: Any) -> list[str]:
        """Return the kinds of loss whose value is the model's own on a batch, the nearest first."""
        if not isinstance(inputs, Mapping) or not isinstance(labels, Tensor):
            raise UserError(
                "loss_of(model) needs batches that are dictionaries with an entry 'labels', got"
                f" {type(inputs).__name__} and {type(labels).__name__}: pass your own loss(outputs, targets)."
            )
        with model_explained(self.model, inputs, len(labels)):
            raw = self.model(**{**inputs, "labels": labels})
        own, logits, name = entry(raw, "loss"), _logits(raw), type(innermost(self.model)).__name__
        if not isinstance(own, Tensor):
            raise UserError(f"{name} returns no `loss` for its labels: pass your own loss(outputs, targets).")
        found = {kind: of(logits, labels) for kind, of in KINDS.items()}
        means = {kind: float(pair[0].sum() / pair[1].sum()) for kind, pair in found.items() if pair}
        off = {kind: abs(mean - float(own)) / max(abs(float(own)), 1e-3) for kind, mean in means.items()}
        close = CLOSE if own.dtype.itemsize >= 4 else CLOSE_IN_16_BITS
        if not (near := sorted((kind for kind in off if off[kind] <= close), key=lambda kind: off[kind])):
            known = ", ".join(f"{kind}: {mean:.5g}" for kind, mean in means.items())
            raise UserError(
                f"{name} returns a loss of {float(own):.5g}, which is none that flatlab can divide among samples"
                f" ({known or 'no kind has labels of this shape'}): pass your own loss(outputs, targets), which"
                " returns each sample's sum and weight."
            )
        return near

    @property
    def remark(self) -> str:
        """The weights of the samples, as a sentence, if they differ; else empty."""
        if "token" not in self.kind:
            return ""
        return (
            f"The loss is the mean {self.kind}, over all counted tokens: the weight of a sample is its number of"
            f" tokens, without those labelled {IGNORED}."
        )


def _logits(outputs: Any) -> Tensor:
    """Return the scores, in at least single precision, in which transformers' models compute their losses."""
    named = entry(outputs, "logits")
    of_samples = [leaf for leaf in tensors(outputs) if leaf.ndim and leaf.is_floating_point()]
    found = named if isinstance(named, Tensor) else next(iter(of_samples), None)
    if found is None:
        raise UserError("loss_of(model) needs a model that returns `logits`: pass your own loss(outputs, targets).")
    return found.float() if found.dtype.itemsize < 4 else found


def _classes(logits: Tensor, labels: Tensor) -> Pair | None:
    if labels.is_floating_point() or logits.ndim != labels.ndim + 1 or logits.shape[:-1] != labels.shape:
        return None
    flat = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), reduction="none", ignore_index=IGNORED)
    counted = labels != IGNORED
    return flat.view(len(labels), -1).sum(1), counted.view(len(labels), -1).sum(1).to(flat.dtype)


def _tokens(logits: Tensor, labels: Tensor) -> Pair | None:
    return _classes(logits, labels) if labels.ndim == 2 else None


def _next_tokens(logits: Tensor, labels: Tensor) -> Pair | None:
    return _tokens(logits[:, :-1], labels[:, 1:]) if labels.ndim == 2 else None


def _binary(logits: Tensor, labels: Tensor) -> Pair | None:
    if not labels.is_floating_point() or logits.shape != labels.shape or logits.ndim != 2:
        return None
    sums = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(1)
    return sums, torch.ones_like(sums)


def _squares(logits: Tensor, labels: Tensor) -> Pair | None:
    if not labels.is_floating_point() or logits.numel() != labels.numel() or len(logits) != len(labels):
        return None
    sums = (logits.reshape(len(labels), -1) - labels.to(logits).reshape(len(labels), -1)).square().mean(1)
    return sums, torch.ones_like(sums)


KINDS: dict[str, Callable[[Tensor, Tensor], Pair | None]] = {
    "cross-entropy of classes": lambda logits, labels: _classes(logits, labels) if labels.ndim == 1 else None,
    "cross-entropy of tokens": _tokens,
    "cross-entropy of next tokens": _next_tokens,
    "binary cross-entropy": _binary,
    "squared error": _squares,
}
