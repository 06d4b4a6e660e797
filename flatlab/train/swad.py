"""SWAD, stochastic weight averaging, densely (Cha et al. 2021): the mean over the valley of the validation loss.

A segment is the iterates between two evaluations, with the validation loss of the last one. The valley begins with the
oldest of `converge` consecutive segments if its loss is the lowest of them; its threshold is (1 + ratio) times their
mean loss. It ends before the first `tolerance` consecutive segments above the threshold.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatlab.specs.run import AverageSpec
from flatlab.tensors.means import Mean, Saved, Weights


@dataclass
class Segment:
    """The mean of the iterates between two evaluations, and the validation loss (nats) of the last one."""

    mean: Mean
    index: int
    start: int  # first step
    end: int  # last step
    loss: float


class SWAD(ABC):
    """Base class of the two rules: segments, the valley's threshold, and the state.

    `valley` holds the valley's first and last step (`start`, `end`) and its `threshold` (nats), each None if none
    began; whether it is `dead` (ended before the training); the indices of the `merged` segments; and the first and
    last step of the averaged iterates (`span`), with a valley or without.
    """

    evaluated = False

    def __init__(self, spec: AverageSpec) -> None:
        self.spec = spec
        self.segment = Mean()  # being filled
        self.recent: deque[Segment] = deque()
        self.pool = Mean()  # of segments that left `recent`
        self.valley: dict[str, Any] = {"start": None, "end": None, "threshold": None, "dead": False}
        self.valley |= {"merged": [], "span": None}
        self.index = 0
        self.first: int | None = None  # step of the segment being filled
        self.step = 0

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """Receive the weights after the update of `step`."""
        if self.valley["dead"]:
            return
        self.segment.add(weights)
        self.first, self.step = step if self.first is None else self.first, step
        if step % self.spec.every == 0:
            loss = validate()
            loss = math.inf if math.isnan(loss) else loss  # so that it lies above every threshold
            self.recent.append(Segment(self.segment, self.index, self.first, step, loss))
            self.segment, self.first, self.index = Mean(), None, self.index + 1
            self._evaluated()

    @abstractmethod
    def _evaluated(self) -> None:
        """Update the valley by the newest segment."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Return the averaged weights, as if training ended here."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what the log records: the valley of `result`."""

    def _newest(self, count: int) -> list[Segment]:
        return list(self.recent)[-count:]

    def _begins(self) -> bool:
        """Return whether a valley begins, and if so set its threshold."""
        newest = self._newest(self.spec.converge)
        losses = [segment.loss for segment in newest]
        if len(newest) < self.spec.converge or losses[0] > min(losses) or not math.isfinite(sum(losses)):
            return False
        mean = max(losses[0], sum(losses) / len(losses))  # rounding may put a mean of equal losses below the least
        self.valley |= {"start": newest[0].start, "threshold": (1 + self.spec.ratio) * mean}
        return True

    def _above(self, segments: Sequence[Segment]) -> bool:
        return min(segment.loss for segment in segments) > float(self.valley["threshold"])

    def save(self) -> Saved:
        """Return the observer's state."""
        parts = {"segment": self.segment, "pool": self.pool, **{f"recent{s.index}": s.mean for s in self.recent}}
        tensors = {f"{part}/{name}": value for part, mean in parts.items() for name, value in mean.tensors.items()}
        recent = [{"index": s.index, "start": s.start, "end": s.end, "loss": s.loss} for s in self.recent]
        counts = {part: mean.count for part, mean in parts.items()}
        facts = {"valley": self.valley, "index": self.index, "first": self.first, "step": self.step}
        return tensors, {**facts, "recent": recent, "counts": counts}

    def load(self, saved: Saved) -> None:
        """Restore a saved state."""
        tensors, facts = saved
        means = {part: Mean(_below(part, tensors), count) for part, count in facts["counts"].items()}
        self.segment, self.pool = means["segment"], means["pool"]
        self.valley, self.index = facts["valley"], facts["index"]
        self.first, self.step = facts["first"], facts["step"]
        self.recent.clear()
        self.recent.extend(Segment(means[f"recent{s['index']}"], **s) for s in facts["recent"])


class Published(SWAD):
    """Algorithm 1 of the paper: the unweighted mean over the iterates from t_s to t_e.

    It starts with t_s = 0 and t_e = T, the last step: a valley that does not end extends to T, and if none begins, all
    iterates are averaged. The result is the mean of `pool`, `recent` and the segment being filled.
    """

    def _evaluated(self) -> None:
        if self.valley["start"] is None:
            if self._begins():
                newest = self._newest(self.spec.converge)
                self.pool, self.recent = Mean(), deque(newest)
                self.valley |= {"merged": [], "span": None}
        elif self._above(self._newest(self.spec.tolerance)):
            self.valley["dead"] = True
            self.recent = deque(list(self.recent)[: -self.spec.tolerance])
        while len(self.recent) > max(self.spec.converge, self.spec.tolerance):
            oldest = self.recent.popleft()
            self.pool.add(oldest.mean.tensors, oldest.mean.count)
            first = (self.valley["span"] or [oldest.start])[0]
            self.valley |= {"merged": [*self.valley["merged"], oldest.index], "span": [first, oldest.end]}

    def result(self) -> dict[str, Tensor]:
        """Return the averaged weights, as if training ended here."""
        whole = self.pool.copy()
        parts = [*(segment.mean for segment in self.recent), self.segment]
        for mean in (part for part in parts if part.count):
            whole.add(mean.tensors, mean.count)
        return whole.tensors

    def facts(self) -> dict[str, Any]:
        """Return what the log records: the valley of `result`; the segment being filled counts as merged."""
        indices, steps = list(self.valley["merged"]), list(self.valley["span"] or [])
        for segment in self.recent:
            indices, steps = [*indices, segment.index], [*steps, segment.start, segment.end]
        if self.first is not None:
            indices, steps = [*indices, self.index], [*steps, self.first, self.step]
        span = [steps[0], steps[-1]] if steps else None
        end = span[1] if span and self.valley["start"] is not None else None
        return {"valley": {**self.valley, "merged": indices, "span": span, "end": end}}


class Released(SWAD):
    """The rule as khanrc/swad computes it (swad.py, swa_utils.py): the unweighted mean of segments.

    It differs from the paper: the first segment enters with count 0, so that the first merge overwrites it; filling in
    begins one segment late; the oldest segment of a window that is not full is merged repeatedly. A valley that does
    not end extends to the last evaluation that is not above the threshold; if none begins, the result is the last
    segment.
    """

    def _evaluated(self) -> None:
        while len(self.recent) > max(self.spec.converge, self.spec.tolerance):
            self.recent.popleft()
        if self.valley["start"] is None:
            if self._begins():
                self._begin()
            return
        window = self._newest(self.spec.tolerance)
        if window[0].end < self.valley["start"]:
            return
        if self._above(window):
            self.valley["dead"] = True
            self.recent.clear()
        else:
            self._merge(window[:1])

    def _begin(self) -> None:
        newest = self._newest(self.spec.converge)
        self.pool.tensors = dict(newest[0].mean.tensors)
        self._note([], newest[0])
        gap = self.spec.tolerance - self.spec.converge
        if gap < 0:
            self._merge(newest[1 : 1 - gap])
        elif gap > 0:
            older = self._newest(self.spec.tolerance)[: gap + 1]
            above = [i for i, segment in enumerate(older) if self._above([segment])]
            self._merge(older[(above[-1] + 1 if above else 0) + 1 :])

    def _merge(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            merged = self.valley["merged"] if self.pool.count else []  # the first merge overwrites
            self.pool.add(segment.mean.tensors)
            self._note(merged, segment)

    def _note(self, merged: list[int], segment: Segment) -> None:
        first = min(self.valley["span"][0], segment.start) if merged else segment.start
        self.valley |= {"merged": [*merged, segment.index], "span": [first, segment.end], "end": segment.end}

    def _rest(self) -> list[Segment]:
        """Return the segments that are merged at the end of training into a valley that has not ended."""
        window = self._newest(self.spec.tolerance)[1:]
        low = [i for i, segment in enumerate(window) if not self._above([segment])]
        return window[: low[-1] + 1] if low else []

    def _ended(self) -> "Released":
        """Return a copy of this observer, finished as if training ended here."""
        ended = Released(self.spec)
        ended.pool, ended.valley = self.pool.copy(), dict(self.valley)
        if self.valley["start"] is not None:
            ended._merge([] if self.valley["dead"] else self._rest())
            return ended
        last = self.recent[-1] if self.recent else Segment(self.segment, 0, self.first or 0, self.step, math.inf)
        ended.pool, ended.valley["span"] = last.mean, [last.start, last.end]
        return ended

    def result(self) -> dict[str, Tensor]:
        """Return the averaged weights, as if training ended here."""
        return dict(self._ended().pool.tensors)

    def facts(self) -> dict[str, Any]:
        """Return what the log records: the valley of `result`."""
        return {"valley": self._ended().valley}


def _below(part: str, tensors: Weights) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}
