"""Averages: observers of one trajectory, which hand over weights of their own.

`update(weights, step, validate)` sees the network's weights after each step; `validate()` gives the mean validation
loss of those weights over the source domains, and is computed only when asked. `result()` gives the weights handed
over, and changes nothing. Buffers are averaged like weights; where an average is not `evaluated` as it goes and
BatchNorm's statistics are not frozen, the loop computes those anew.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from flatlab.specs import AverageSpec

Weights = Mapping[str, Tensor]
Saved = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON facts, for resuming


class Average(Protocol):
    """An observer of a trajectory."""

    evaluated: bool  # at each evaluation, and selected by validation; else only at the end

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """See the weights after the update of `step`."""

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over."""

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log."""

    def save(self) -> Saved:
        """Return the observer's state."""

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""


@dataclass
class Mean:
    """The running mean of weights; integer entries follow the last."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    @torch.no_grad()
    def add(self, weights: Weights) -> None:
        """Take one more set of weights into the mean."""
        self.count += 1
        for name, value in weights.items():
            if self.count == 1 or not value.is_floating_point():
                self.tensors[name] = value.detach().clone()
            else:
                self.tensors[name].lerp_(value, 1 / self.count)


class Last:
    """No average: the trajectory's own weights."""

    evaluated = True

    def __init__(self) -> None:
        self.weights: Weights = {}

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """See the weights after the update of `step`."""
        del step, validate
        self.weights = weights

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over."""
        return dict(self.weights)

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log."""
        return {}

    def save(self) -> Saved:
        """Return the observer's state: none, since the weights are the network's."""
        return {}, {}

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""
        del saved


class Running:
    """SWA (Izmailov et al. 2018): each `every` steps from `start` on. SMA (Arpit et al. 2022): all from `start` on.

    SMA averages buffers too, is evaluated as it goes, and before its start is the last iterate.
    """

    def __init__(self, spec: AverageSpec, switch: int) -> None:
        # EoA's loop counts from 1, and lets the iterate before its start weigh one: two earlier than the number says.
        first = spec.start if spec.kind == "swa" else max(0, spec.start - 2)
        self.start = max(first, switch)
        self.every = spec.every
        self.evaluated = spec.kind == "sma"
        self.mean = Mean()

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """See the weights after the update of `step`."""
        del validate
        if step < self.start:
            self.mean = Mean(dict(weights), 0)
        elif (step - self.start) % self.every == 0:
            self.mean.add(weights)

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over."""
        return dict(self.mean.tensors)

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log."""
        return {"averaged": self.mean.count}

    def save(self) -> Saved:
        """Return the observer's state."""
        return dict(self.mean.tensors), {"count": self.mean.count}

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""
        self.mean = Mean(saved[0], saved[1]["count"])


@dataclass
class Segment:
    """The mean of the iterates between two evaluations, and the validation loss at its end."""

    mean: Mean
    index: int
    start: int  # first step
    end: int  # last step
    loss: float


class SWAD:
    """Stochastic weight averaging, densely (Cha et al. 2021): the mean over the valley of the validation loss.

    The valley begins at the oldest of `converge` evaluations when it is the lowest of them; its rim is (1 + ratio)
    times their mean; it ends before `tolerance` evaluations in a row that lie above the rim. Each segment weighs the
    same. Where no valley begins, the last segment is handed over (as khanrc/swad does).
    """

    evaluated = False

    def __init__(self, spec: AverageSpec) -> None:
        self.spec = spec
        self.segment = Mean()  # being filled
        self.recent: deque[Segment] = deque(maxlen=max(spec.converge, spec.tolerance))
        self.pool = Mean()  # of segments
        self.valley: dict[str, Any] = {"start": None, "end": None, "threshold": None, "dead": False, "merged": []}
        self.index = 0
        self.first: int | None = None  # step of the segment being filled

    def update(self, weights: Weights, step: int, validate: Callable[[], float]) -> None:
        """See the weights after the update of `step`."""
        if self.valley["dead"]:
            return
        self.segment.add(weights)
        self.first = step if self.first is None else self.first
        if step % self.spec.every == 0:
            loss = validate()
            loss = math.inf if math.isnan(loss) else loss  # so that it lies above every rim
            self.recent.append(Segment(self.segment, self.index, self.first, step, loss))
            self.segment, self.first, self.index = Mean(), None, self.index + 1
            (self._begin if self.valley["start"] is None else self._advance)()

    def _begin(self) -> None:
        newest = list(self.recent)[-self.spec.converge :]
        losses = [segment.loss for segment in newest]
        if len(newest) < self.spec.converge or losses[0] > min(losses) or not math.isfinite(sum(losses)):
            return
        self.valley["start"] = newest[0].start
        self.valley["threshold"] = (1 + self.spec.ratio) * sum(losses) / len(losses)
        if self.spec.exact_repo:
            self._begin_as_released(newest)
        else:  # what no window of `tolerance` evaluations will hold any more, and the oldest of the present one
            self._merge(newest[: max(1, self.spec.converge - self.spec.tolerance + 1)])

    def _begin_as_released(self, newest: list[Segment]) -> None:
        # khanrc/swad: the first model enters with count 0, so that the first merge overwrites it; the fill-in
        # starts one segment late. Both are kept here on purpose.
        self.pool.tensors = dict(newest[0].mean.tensors)
        self.valley |= {"merged": [newest[0].index], "end": newest[0].end}
        gap = self.spec.tolerance - self.spec.converge
        if gap < 0:
            self._merge(newest[1 : 1 - gap])
        elif gap > 0:
            older = self._window()[: gap + 1]
            above = [i for i, segment in enumerate(older) if segment.loss > self.valley["threshold"]]
            self._merge(older[(above[-1] + 1 if above else 0) + 1 :])

    def _advance(self) -> None:
        window = self._window()
        if self.spec.exact_repo and window[0].end < self.valley["start"]:
            return
        if min(segment.loss for segment in window) > self.valley["threshold"]:
            self.valley["dead"] = True
            self.recent.clear()
        else:
            self._merge(window[:1])

    def _window(self) -> list[Segment]:
        return list(self.recent)[-self.spec.tolerance :]

    def _merge(self, segments: list[Segment]) -> None:
        for segment in self._fresh(segments):
            merged = self.valley["merged"] if self.pool.count else []  # the first merge overwrites
            self.pool.add(segment.mean.tensors)
            self.valley |= {"merged": [*merged, segment.index], "end": segment.end}

    def _fresh(self, segments: list[Segment]) -> list[Segment]:
        """Return those inside the valley that are not merged yet; the released code does not ask."""
        if self.spec.exact_repo:
            return segments
        newest = max(self.valley["merged"], default=-1)
        return [s for s in segments if s.index > newest and s.start >= self.valley["start"]]

    def _rest(self) -> list[Segment]:
        """Return what a living valley takes in at the end: up to the last evaluation that is not above the rim."""
        if self.valley["start"] is None or self.valley["dead"]:
            return []
        window = self._window()[1 if self.spec.exact_repo else 0 :]
        low = [i for i, segment in enumerate(window) if segment.loss <= self.valley["threshold"]]
        return self._fresh(window[: low[-1] + 1]) if low else []

    def result(self) -> dict[str, Tensor]:
        """Return the weights handed over, as if training ended here."""
        if self.valley["start"] is None:
            return dict(self.recent[-1].mean.tensors if self.recent else self.segment.tensors)
        whole = Mean({name: value.clone() for name, value in self.pool.tensors.items()}, self.pool.count)
        for segment in self._rest():
            whole.add(segment.mean.tensors)
        return whole.tensors

    def facts(self) -> dict[str, Any]:
        """Return what is worth a line in the log: the valley's start, end, threshold and segments, as of `result`."""
        if not (rest := self._rest()):
            return {"valley": dict(self.valley)}
        merged = self.valley["merged"] if self.pool.count else []
        return {"valley": {**self.valley, "merged": [*merged, *(s.index for s in rest)], "end": rest[-1].end}}

    def save(self) -> Saved:
        """Return the observer's state."""
        parts = {"segment": self.segment, "pool": self.pool, **{f"recent{s.index}": s.mean for s in self.recent}}
        tensors = {f"{part}/{name}": value for part, mean in parts.items() for name, value in mean.tensors.items()}
        recent = [{"index": s.index, "start": s.start, "end": s.end, "loss": s.loss} for s in self.recent]
        counts = {part: mean.count for part, mean in parts.items()}
        facts = {"valley": self.valley, "index": self.index, "first": self.first, "recent": recent, "counts": counts}
        return tensors, facts

    def load(self, saved: Saved) -> None:
        """Take up a saved state."""
        tensors, facts = saved
        means = {part: Mean(_below(part, tensors), count) for part, count in facts["counts"].items()}
        self.segment, self.pool = means["segment"], means["pool"]
        self.valley, self.index, self.first = facts["valley"], facts["index"], facts["first"]
        self.recent.clear()
        self.recent.extend(Segment(means[f"recent{s['index']}"], **s) for s in facts["recent"])


def _below(part: str, tensors: Weights) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): value for name, value in tensors.items() if name.startswith(f"{part}/")}


def build(spec: AverageSpec, *, switch: int | None) -> Average:
    """Return the observer that a spec names; it begins at the switch where there is one."""
    match spec.kind:
        case "swa" | "sma":
            return Running(spec, switch or 0)
        case "swad":
            return SWAD(spec)
        case _:
            return Last()
