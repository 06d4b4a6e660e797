"""Freezing of step sizes by the disorder of their gradients (GAQAT, FQAT), as an extension of the SAGM step."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatlab.quant.attach import quantized_layers, scales
from flatlab.specs.run import FreezeSpec, StepSpec
from flatlab.train.steps import SAGM, Gradients

KINDS = ("task", "smooth", "between")  # disorder of the task gradient, of the perturbed loss's, and between the two
STATE = ("last", "counts", "logged", "frozen", "shares", "steps")


def layer_of(name: str) -> str:
    """Return the layer that a step size belongs to: that of its input has the layer's name with a suffix."""
    return name.removesuffix(".activations")


class Disorder:
    """Counts how often the signs of step sizes' gradients change, and decides which of them are frozen.

    Args:
        step_sizes: step sizes by name, as `quant.attach.scales` returns them.
        spec: the rule.

    Attributes:
        last: (2, n), the last nonzero sign of the task gradient and of the perturbed loss's gradient.
        counts: (3, 2, units), changes of sign and pairs of signs for each of `KINDS`, since the last decision, or
            decaying exponentially.
        frozen: (n,), whether each step size is frozen.
        logged: (3, 2, tensors), changes and pairs since the last row of the log.
        shares: (tensors,), frozen share of each tensor, summed over the `steps[1]` steps since that row.
        steps: (2,), number of steps in all, and since that row.
    """

    def __init__(self, step_sizes: Mapping[str, nn.Parameter], spec: FreezeSpec) -> None:
        self.step_sizes = dict(sorted(step_sizes.items()))
        self.spec = spec
        device = next(iter(step_sizes.values())).device
        lengths = torch.tensor([each.numel() for each in self.step_sizes.values()])
        self.tensor = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)  # (n,) of each step size
        layers = list(dict.fromkeys(map(layer_of, self.step_sizes)))
        layer = torch.tensor([layers.index(layer_of(name)) for name in self.step_sizes], device=device)
        each = torch.arange(len(self.tensor), device=device)
        self.unit = {"scale": self.tensor, "channel": each, "layer": layer[self.tensor]}[spec.unit]
        self.sizes = lengths.tolist()
        self.last = torch.zeros(2, len(each), device=device)
        self.counts = torch.zeros(len(KINDS), 2, int(self.unit.max()) + 1, device=device)
        self.frozen = torch.zeros(len(each), dtype=torch.bool, device=device)
        self.logged = torch.zeros(len(KINDS), 2, len(lengths), device=device)
        self.shares = torch.zeros(len(lengths), device=device)
        self.steps = torch.zeros(2, dtype=torch.int64)

    @torch.no_grad()
    def see(self, task: Gradients, smooth: Gradients) -> None:
        """Count the signs of one step, and decide if a decision is due; a missing gradient counts as zero."""
        signs = torch.stack([self._flat(task), self._flat(smooth)]).sign()
        before = torch.cat([self.last, signs[1:]])  # the signs with which those of `now` are compared, by KINDS
        now = torch.cat([signs, signs[:1]])
        pairs = (now * before != 0).float()
        seen = torch.stack([pairs * (now != before), pairs], dim=1)  # (3, 2, n)
        self.last = torch.where(signs != 0, signs, self.last)
        self.shares += self._sums(self.frozen.float(), self.tensor, len(self.sizes)) / torch.tensor(self.sizes).to(
            self.shares
        )
        self.logged += self._sums(seen, self.tensor, len(self.sizes))
        fading = 1 - 1 / self.spec.every if self.spec.when == "step" else 1.0
        self.counts = fading * self.counts + self._sums(seen, self.unit, self.counts.shape[-1])
        self.steps += 1
        if not self.spec.alternate and (self.spec.when == "step" or int(self.steps[0]) % self.spec.every == 0):
            self._decide()

    def _flat(self, grads: Gradients) -> Tensor:
        found = [grads.get(each, torch.zeros_like(each)).flatten() for each in self.step_sizes.values()]
        return torch.cat(found)

    @staticmethod
    def _sums(values: Tensor, of: Tensor, count: int) -> Tensor:
        """Return sums over the last axis by group; those of `see` are of integers, exact in any order."""
        return torch.zeros(*values.shape[:-1], count, device=values.device).index_add_(-1, of, values)

    @property
    def disorder(self) -> Tensor:
        """The disorder (units,) that decides; NaN where there was no pair of signs."""
        changes, pairs = self.counts[KINDS.index(self.spec.trigger)].unbind()
        disorder: Tensor = changes / pairs
        return disorder

    def _decide(self) -> None:
        found, high = self.disorder, self.spec.direction == "high"
        if self.spec.top is None:
            chosen = found > self.spec.threshold if high else found < self.spec.threshold  # of NaN, neither holds
        else:
            order = torch.where(found.isnan(), -torch.inf, found if high else -found).argsort(
                descending=True, stable=True
            )
            chosen = torch.zeros_like(found, dtype=torch.bool)
            chosen[order[: round(self.spec.top * len(found))]] = True
            chosen &= ~found.isnan()
        chosen = chosen[self.unit]
        self.frozen = chosen | self.frozen if self.spec.forever else chosen
        if self.spec.when == "window":
            self.counts.zero_()

    @property
    def withheld(self) -> dict[str, Tensor]:
        """Whether each step size is denied the task gradient and that of the perturbed loss, each (n,) booleans."""
        if self.spec.alternate:
            odd = torch.tensor(int(self.steps[0]) // self.spec.every % 2 == 1, device=self.frozen.device)
            return {"task": odd.expand_as(self.frozen), "smooth": ~odd.expand_as(self.frozen)}
        none = torch.zeros_like(self.frozen)
        return {kind: self.frozen if self.spec.gradient in (kind, "both") else none for kind in ("task", "smooth")}

    def row(self) -> dict[str, Any]:
        """Return disorder of each kind and frozen share of each step-size tensor since the last call; reset both.

        A disorder without a pair of signs is None. The share is that of the decisions, whatever they freeze; 0 if
        gradients alternate.
        """
        changes, pairs = self.logged.unbind(1)
        disorder = (changes / pairs).tolist()
        frozen = (self.shares / max(1, int(self.steps[1]))).tolist()
        rows = {
            name: {
                **{kind: None if pairs[i, j] == 0 else disorder[i][j] for i, kind in enumerate(KINDS)},
                "frozen": frozen[j],
            }
            for j, name in enumerate(self.step_sizes)
        }
        self.logged.zero_()
        self.shares.zero_()
        self.steps[1] = 0
        return rows

    def save(self) -> dict[str, Tensor]:
        """Return the state as tensors."""
        return {name: getattr(self, name) for name in STATE}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore a saved state."""
        for name in STATE:
            setattr(self, name, saved[name].to(getattr(self, name).device))


class Freezing(SAGM):
    """SAGM that withholds gradients from frozen step sizes, or from the latent weights of frozen layers.

    A parameter's gradient is (g + g')/2; where one of the two is withheld, the other one keeps its factor 1/2, or has
    the factor 1 if the spec says `rescale`.

    Args:
        optimizer: optimizer of all parameters.
        network: the quantized network.
        moved: the parameters that the ascent perturbs.
        step: radius, alpha and the rule of freezing.
        disorder: disorder of the step sizes' gradients.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        network: nn.Module,
        moved: Iterable[nn.Parameter],
        *,
        step: StepSpec,
        disorder: Disorder,
    ) -> None:
        super().__init__(optimizer, network, moved, rho=step.rho, alpha=step.alpha)
        self.disorder = disorder
        self.latent = {name: quantized.latent for name, quantized in quantized_layers(network).items()}

    @torch.no_grad()
    def _join(self, task: Gradients, smooth: Gradients) -> None:
        super()._join(task, smooth)
        off = self._withheld()
        self.disorder.see(task, smooth)
        for parameter, (no_task, no_smooth) in off.items():
            if parameter in task and parameter in smooth:
                first, second = (
                    torch.where(no, 0.0, grad)
                    for no, grad in ((no_task, task[parameter]), (no_smooth, smooth[parameter]))
                )
                joined = 0.5 * first + 0.5 * second
                single = no_task ^ no_smooth
                parameter.grad = torch.where(single, 2 * joined, joined) if self.disorder.spec.rescale else joined

    def _withheld(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return, by parameter, masks of the entries without task gradient and without that of the perturbed loss."""
        spec, found = self.disorder.spec, self.disorder.withheld
        parts = zip(*(torch.split(each, self.disorder.sizes) for each in found.values()), strict=True)
        off = {}
        for (name, scale), (no_task, no_smooth) in zip(self.disorder.step_sizes.items(), parts, strict=True):
            if spec.what != "weights":
                off[scale] = no_task.view_as(scale), no_smooth.view_as(scale)
            if spec.what != "steps" and name in self.latent:
                off[self.latent[name]] = no_task.any(), no_smooth.any()
        return off


def disorder_of(network: nn.Module, spec: FreezeSpec) -> Disorder:
    """Return a new `Disorder` of a network's step sizes."""
    return Disorder(scales(network), spec)
