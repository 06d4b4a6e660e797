"""Time left of jobs; each kind of job is timed separately, since a pass costs more in training than in measuring."""

import time
from collections.abc import Callable, Sequence
from statistics import median

from flatlab.jobs.plan import Job

LEAST_SHARE = 0.1  # of a job, before its own pace counts
RECENT = 8  # finished jobs of a kind that count: a machine is not always equally fast


class TimeLeft:
    """Seconds left, estimated from the time of jobs so far."""

    def __init__(self, jobs: Sequence[Job], *, workers: int, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.workers = now, workers
        self.kind = {job.name: job.kind for job in jobs}
        self.cost = {job.name: job.passes for job in jobs}
        self.share = dict.fromkeys(self.cost, 0.0)
        self.begun: dict[str, tuple[float, float]] = {}  # time, and share done by then
        self.warming: set[str] = set()  # first jobs of the workers, which load libraries and data: not timed meanwhile
        self.seconds: dict[str, float] = {}  # of finished jobs

    def on_event(self, name: str, share: float, *, over: bool) -> None:
        """Record the progress of a job."""
        if name not in self.share:
            return
        if name not in self.begun and len(self.begun) < self.workers:
            self.warming.add(name)
        start, first = self.begun.setdefault(name, (self.now(), share))
        if name in self.warming and share > first and not over:
            self.warming.remove(name)
            self.begun[name] = (self.now(), share)
        self.share[name] = 1.0 if over else share
        if over:
            self.seconds.setdefault(name, self.now() - start)

    def done(self) -> float:
        """Return the share of the passes that is done."""
        whole = sum(self.cost.values()) or 1.0
        return sum(self.cost[name] * share for name, share in self.share.items()) / whole

    def left(self) -> float | None:
        """Return the seconds that are left; None before anything is timed."""
        timed = [name for name in self.begun if self._passes(name) > 0 and self.share[name] >= LEAST_SHARE]
        if not timed:
            return None
        waiting = {name: self._pace(name, timed) * self.cost[name] for name, share in self.share.items() if share < 1}
        rest = {name: seconds * (1 - self.share[name]) for name, seconds in waiting.items()}
        return max(sum(rest.values()) / self.workers, max(rest.values(), default=0.0))

    def _pace(self, name: str, timed: Sequence[str]) -> float:
        """Return the seconds of a pass: of the kind, else of similar jobs, else of all; of the last finished if any."""
        for length in (len(self.kind[name]), 2, 1, 0):
            alike = [each for each in timed if self.kind[each][:length] == self.kind[name][:length]]
            alike = [each for each in self.seconds if each in {*alike}][-RECENT:] or alike
            if alike:
                break
        return median(self._spent(each) / self._passes(each) for each in alike)

    def _spent(self, name: str) -> float:
        return self.seconds.get(name, self.now() - self.begun[name][0])

    def _passes(self, name: str) -> float:
        return self.cost[name] * (self.share[name] - self.begun[name][1])
