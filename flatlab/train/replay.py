"""SWA, SMA and SWAD applied after training, to the log or to the kept checkpoints of a finished run.

The observers are those of training (averages.py). If every iterate was kept, their results are those of training, to
the byte; if every Nth was kept, they average only those.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from torch import Tensor

from flatlab.arguments import Report
from flatlab.loading import data as loading_data
from flatlab.loading import network as loading_network
from flatlab.loading.checkpoint import restore
from flatlab.specs.run import AverageSpec, Place, RunSpec
from flatlab.store.runs import Run
from flatlab.store.selection import Row, candidates, training_domain
from flatlab.train import averages
from flatlab.train.averages import Running
from flatlab.train.batches import refresh
from flatlab.train.evaluate import Evaluator, mean
from flatlab.train.swad import SWAD


def valley(run: Run, spec: AverageSpec | None = None) -> dict[str, Any]:
    """Return where the valley of a run's validation loss begins and ends, and its threshold (Cha et al. 2021).

    Args:
        run: a finished run; its evaluations from the switch on are used.
        spec: N_s, N_e, r and the rule; by default SWAD's. The interval is that of the run's evaluations.

    Returns:
        start and end (steps) and threshold (nats), each None if no valley began; dead, whether the valley ended before
        the training; span, first and last step of the averaged iterates, with a valley or without.
    """
    rule = averages.build((spec or AverageSpec()).replace(kind="swad", every=1), switch=None)
    for row in candidates(run.rows(), run.spec.switch):
        rule.update({}, row["step"], partial(float, row["validation_loss"]))
    return _valley(rule)


def _valley(rule: averages.Average) -> dict[str, Any]:
    found = rule.facts()["valley"]
    return {name: found[name] for name in ("start", "end", "threshold", "dead", "span")}


@dataclass(frozen=True)
class ReplayedAverage:
    """An average of kept checkpoints, and its scores.

    Attributes:
        weights: the averaged weights and buffers, by name, BatchNorm's statistics included.
        row: a row of a run's log: accuracies and losses (nats) of these weights.
        every: steps between the averaged iterates; for SWAD, between its evaluations.
        first: step of the first averaged iterate.
        last: step of the last averaged iterate.
        valley: for SWAD, as `valley` returns it; else empty.
        rule: SWAD's rule, "paper" or "released".
    """

    weights: dict[str, Tensor]
    row: Row
    every: int
    first: int
    last: int
    valley: dict[str, Any]
    rule: str


@dataclass(frozen=True)
class Replay:
    """Averages of the checkpoints that a run's training kept.

    Attributes:
        every: steps between two checkpoints.
        averages: the averages by the names of their rules.
        losses: mean validation loss (nats) over the source domains, by step, where a rule needed it.
    """

    every: int
    averages: dict[str, ReplayedAverage]
    losses: dict[int, float]


def replay(run: Run, rules: Mapping[str, AverageSpec], place: Place, *, report: Report | None = None) -> Replay:
    """Apply averages to the checkpoints that a run's training kept (`train(..., keep_every=N)`), and evaluate them.

    Args:
        run: a finished run that was trained in this store, with any average.
        rules: the averages, by name. Their intervals are rounded up to multiples of N.
        place: data folder, device.
        report: called after each checkpoint.

    Raises:
        UserError: the run was not trained here, is not done, or has not kept its checkpoints.
    """
    every = run.kept_each()
    with loading_data.computing(run.lineage.provenance.get("threads") or place.threads):
        replaying = _Replaying(run, every, place)
        observers = {name: replaying.observer(rule) for name, rule in rules.items()}
        for count, step in enumerate(replaying.kept, 1):
            replaying.show(step, list(observers.values()))
            if report:
                report(count, len(replaying.kept))
        return Replay(every, {name: replaying.end(each) for name, each in observers.items()}, replaying.losses)


@dataclass
class _Observer:
    """An average, its log, and the weights that validation selects."""

    spec: RunSpec
    average: averages.Average
    every: int
    rows: list[Row] = field(default_factory=list)
    chosen: dict[str, Tensor] = field(default_factory=dict)

    def log(self, row: Row, weights: Mapping[str, Tensor]) -> None:
        """Add a row, and keep the weights if this row is now the selected one, as the loop does."""
        self.rows.append(row)
        if self.best is row:
            self.chosen = {name: value.clone() for name, value in weights.items()}

    @property
    def best(self) -> Row:
        """The row that validation selects."""
        return training_domain(candidates(self.rows, self.spec.settled) or self.rows[-1:])


class _Replaying:
    """The trajectory's network, which holds one kept checkpoint after another."""

    def __init__(self, run: Run, every: int, place: Place) -> None:
        self.run, self.spec, self.every, self.device = run, run.spec.trajectory, every, loading_data.device(place)
        self.kept = {step: path for step, path in run.kept().items() if step in self.spec.iterates(every)}
        self.domains = loading_data.domains(self.spec, place)
        run.check_data(self.domains.data.fingerprint)
        self.judge = Evaluator(self.domains, self.device, self.spec)
        self.network = loading_network.finished(self.spec, self.domains.data, place)
        self.shadow = copy.deepcopy(self.network)  # holds averages while they are evaluated
        self.losses: dict[int, float] = {}

    def observer(self, rule: AverageSpec) -> _Observer:
        """Return a rule's observer, its steps rounded up to those that were kept."""
        every = 1 if rule.every <= self.every else _upwards(rule.every, self.every)
        average = averages.build(rule.replace(every=every), switch=self.spec.switch)
        if isinstance(average, Running):
            average.start = _upwards(average.start, self.every)
        return _Observer(self.spec.replace(average=rule), average, max(every, self.every))

    def show(self, step: int, observers: list[_Observer]) -> None:
        """Pass a checkpoint to the observers; log those that are evaluated in training, at the run's evaluations."""
        restore(self.network, self.run, self.kept[step])
        validate = cache(partial(self._validate, step))
        interval = 1 if self.spec.eval_every <= self.every else _upwards(self.spec.eval_every, self.every)
        for observer in observers:
            observer.average.update(self.network.state_dict(), step, validate)
            if observer.average.evaluated and (step % interval == 0 or step == max(self.kept)):
                self.shadow.load_state_dict(observer.average.result())
                observer.log(self.judge.row(self.shadow, step), self.shadow.state_dict())

    def _validate(self, step: int) -> float:
        self.losses[step] = mean(self.judge.sources(self.network), "loss")
        return self.losses[step]

    def end(self, observer: _Observer) -> ReplayedAverage:
        """Return the average of an observer, evaluated."""
        average = observer.average
        if not average.evaluated:
            self.shadow.load_state_dict(average.result())
            refresh(self.shadow, observer.spec, self.domains, self.device)
            observer.log(self.judge.row(self.shadow, self.spec.steps), self.shadow.state_dict())
        found = _valley(average) if isinstance(average, SWAD) else {}
        first, last = self._span(average, observer.best["step"])
        rule = observer.spec.average.rule
        return ReplayedAverage(observer.chosen, observer.best, observer.every, first, last, found, rule)

    def _span(self, average: averages.Average, until: int) -> tuple[int, int]:
        """Return the steps of the first and the last averaged iterate."""
        if isinstance(average, SWAD):
            first, last = _valley(average)["span"]
            return first, last
        seen = [step for step in self.kept if step <= until]
        inside = [step for step in seen if isinstance(average, Running) and step >= average.start] or seen[-1:]
        return inside[0], inside[-1]


def _upwards(steps: int, every: int) -> int:
    """Return the least multiple of `every` that is at least `steps`."""
    return -(-steps // every) * every
