"""Checks of a loss when a landscape is created.

Passes over the data, in forward passes: 2 for the values (of more than 10,000 samples fewer, down to 1.1), 1 for first
derivatives on a tenth of the samples (at least one of each stratum) and, if some parameters seem not to change the
loss, 1 more, else 0.3 for a jump at the point.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatlab.arguments import FloatArray
from flatlab.derivatives.autograd import rounding
from flatlab.errors import UserError, reason
from flatlab.landscape.checks import Total, Versions, note_undone, refuse_rewriting, refuse_training, version, written
from flatlab.landscape.failures import loss_explained
from flatlab.landscape.slope_checks import Slice, check_slope, jump
from flatlab.landscape.value_checks import Singly, Weigh, check_fixed, check_values, refuse_mixing_across
from flatlab.seeds import generator
from flatlab.tensors.calls import call
from flatlab.tensors.flat import flatten, refuse_overlap, scales_of, split_like
from flatlab.tensors.nested import Batch, spread

SHARE, MOST = 10, 256  # derivatives are checked on one sample in `SHARE`, on at most `MOST`


@dataclass(frozen=True)
class Opening:
    """A landscape that is being created.

    Attributes:
        model: in eval mode.
        named: the parameters that vary.
        state: the versions of all other tensors.
        strata: names of the strata.
        batches: of each stratum.
        forward: the model, for values.
        total: from outputs and batch to the sum of the losses.
        weigh: from outputs and batch to the weight of the batch.
        singly: from outputs and targets to the samples' losses, if the loss is known.
        visiting: sets the parameters to a point, and restores them.
    """

    model: nn.Module
    named: Mapping[str, nn.Parameter]
    state: Versions
    strata: Sequence[str]
    batches: Sequence[Sequence[Batch]]
    forward: Callable[[Any], Any]
    total: Total
    weigh: Weigh
    singly: Singly
    visiting: Callable[[Tensor | None], AbstractContextManager[None]]

    def values(self) -> tuple[FloatArray, FloatArray]:
        """Return the sum of the losses and the weight (S,) of each stratum; refuse a loss that is not a function."""
        refuse_training(self.model)
        refuse_rewriting(self.model)
        self._refuse_overlap()
        total = loss_explained(self.total)
        # Not inference_mode: tensors cached in a first pass (rotary tables) must stay usable in training.
        with self._put_back(), self.visiting(None), torch.no_grad():
            for batch in self._few():
                check_fixed(self.forward, batch, total)
            self._refuse_writing()
            found = [check_values(self.forward, each, total, self.weigh, self.singly) for each in self.batches]
            lone = [each[0] for each in self.batches if len(each) == each[0].size == 1]
            refuse_mixing_across(self.forward, lone, total)
            self._refuse_writing()
            self._refuse_moving_weights()
        sizes = [sum(batch.size for batch in each) for each in self.batches]
        weights = [size if weight is None else float(weight) for (_, weight), size in zip(found, sizes, strict=True)]
        sums = np.array([float(each) for each, _ in found])
        base = sums / np.array(weights, dtype=float)
        if not np.isfinite(base).all():
            losses = dict(zip(self.strata, base.tolist(), strict=True))
            raise UserError(f"The loss at the point itself must be finite, but is {losses}: no flatness is defined.")
        return sums, np.array(weights, dtype=float)

    def slopes(self, sums: FloatArray) -> list[str]:
        """Refuse a gradient that is not the loss's slope; return sentences on parameters that do not change the loss.

        Args:
            sums: of the losses (S,) at the point itself.
        """
        if rounding(self.model, self.named.values()):
            return []  # the gradient is intentionally that of another function
        few = self._few()
        looks = partial(self.visiting, None), partial(self._value, few), partial(self._gradient, few)
        part = Slice([*self.named], [*self.named.values()], *looks)
        try:
            still = check_slope(part)
        except (RuntimeError, MemoryError) as error:  # values need no gradient
            return [f"The gradient was not checked against the values, since it cannot be computed: {reason(error)}"]
        return self._unmoved(still, sums) if still else list(filter(None, [jump(part)]))

    def _few(self) -> list[Batch]:
        counts = [sum(batch.size for batch in each) for each in self.batches]
        most = [max(1, min(count // SHARE, MOST // len(counts))) for count in counts]
        return list(chain(*(spread(each, count) for each, count in zip(self.batches, most, strict=True))))

    def _value(self, few: Sequence[Batch]) -> float:
        with torch.no_grad():
            sums = [self.total(self.forward(batch.inputs), batch) for batch in few]
            return float(torch.stack(sums).sum()) / sum(batch.size for batch in few)

    def _gradient(self, few: Sequence[Batch]) -> list[Tensor | None]:
        tensors, count = [*self.named.values()], sum(batch.size for batch in few)
        found: list[Tensor | None] = [None] * len(tensors)
        with torch.enable_grad():
            for batch in few:
                loss = self.total(call(self.model, batch.inputs), batch) / count
                slopes = torch.autograd.grad(loss, tensors, allow_unused=True) if loss.requires_grad else found
                for index, slope in enumerate(slopes):
                    if slope is not None and loss.requires_grad:
                        before = found[index]
                        found[index] = slope if before is None else before + slope
        return found

    def _refuse_moving_weights(self) -> None:
        """Refuse weights of samples that change with the parameters: they are computed once, at the point."""
        few = self._few()
        here = [self.weigh(self.forward(batch.inputs), batch) for batch in few]
        if all(each is None for each in here):
            return
        tensors = [*self.named.values()]
        noise = torch.randn(sum(t.numel() for t in tensors), generator=generator("opening", "weights"))
        with self.visiting(flatten(tensors) + scales_of(tensors) * noise.to(tensors[0])):
            there = [self.weigh(self.forward(batch.inputs), batch) for batch in few]
        pairs = zip(here, there, strict=True)
        if any(one is not None and other is not None and not torch.equal(one, other) for one, other in pairs):
            raise UserError(
                "The weights that the loss returns change with the parameters, but must come from the targets alone"
                " (a mask of confident outputs does not): compute them from the targets, or move them into the sums."
            )

    def _unmoved(self, names: Sequence[str], sums: FloatArray) -> list[str]:
        """Report parameters of zero gradient that do not change the loss on any sample."""
        tensors = [*self.named.values()]
        noise = torch.randn(sum(t.numel() for t in tensors), generator=generator("opening", "unmoved"))
        steps = split_like(scales_of(tensors) * noise.to(tensors[0]), tensors)
        moves = (
            step if name in names else torch.zeros_like(step) for name, step in zip(self.named, steps, strict=True)
        )
        with self.visiting(flatten(tensors) + flatten(moves)), torch.no_grad():
            moved = [sum(float(self.total(self.forward(b.inputs), b)) for b in each) for each in self.batches]
        if not np.allclose(moved, sums, rtol=1e-6, atol=0.0):
            return []
        count, every = sum(self.named[name].numel() for name in names), sum(t.numel() for t in tensors)
        if not count:  # tensors without elements
            return []
        listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return [
            f"{count:,} of the {every:,} parameters ({count / every:.1%}) do not change the loss ({listed}), and"
            " random directions are diluted by them: exclude them with params=, or requires_grad_(False)."
        ]

    def _refuse_overlap(self) -> None:
        tensors = [*self.named.values()]
        noise = torch.randn(sum(t.numel() for t in tensors), generator=generator("landscape", "probe")).to(tensors[0])
        with self.visiting(noise):
            refuse_overlap(flatten(tensors), noise)

    def _refuse_writing(self) -> None:
        if changed := written(self.model, self.named.values(), self.state):
            raise UserError(
                f"A forward pass changes {changed!r} of the model, so that its loss depends on what was evaluated"
                " before: freeze it."
            )

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Restore buffers if the model is refused, since a forward pass may have changed them."""
        buffers = list(self.model.buffers())
        kept, before = [buffer.clone() for buffer in buffers], [version(buffer) for buffer in buffers]
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for buffer, bits, number in zip(buffers, kept, before, strict=True):
                    if version(buffer) != number:
                        buffer.copy_(bits)
            note_undone(buffers, before)
            raise
