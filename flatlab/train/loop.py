"""The training loop: one trajectory, its observers, and a state on disk from which a killed training is resumed.

The updates are those of steps 0 to `steps`, both included. The network is evaluated after the update of each step that
is a multiple of `eval_every`, and after the last (khanrc/swad, trainer.py). Batches and dropout masks are functions of
seed and step: a state holds no random generator, and both passes of SAM or SAGM have the same mask. Runs that differ
only in their average share one call.
"""

import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlab import environment, files
from flatlab.arguments import JobReport
from flatlab.errors import UserError, count_of
from flatlab.loading import data as loading_data
from flatlab.models.networks import Network, set_training
from flatlab.seeds import seeded
from flatlab.specs.run import Place, RunSpec
from flatlab.store.runs import Run, RunStore, check_data
from flatlab.store.selection import Row, candidates, target_accuracy, training_domain
from flatlab.tensors.memory import out_of_memory
from flatlab.train.batches import refresh, stream
from flatlab.train.derived import derive
from flatlab.train.evaluate import Evaluator, Score, mean
from flatlab.train.objectives import objective_of
from flatlab.train.steps import Step
from flatlab.train.trajectory import Observer, Trajectory, arrays

SAVE_SECONDS = 30.0  # maximum time between saved states, in addition to one at each evaluation
CHECK_STEPS = 25  # steps between reads of the losses from an accelerator, since reading waits for it


def train(
    specs: Sequence[RunSpec],
    store: RunStore,
    place: Place,
    *,
    forks: Collection[int] = (),
    keep_every: int | None = None,
    report: JobReport | None = None,
) -> None:
    """Train the runs of one trajectory, resuming where an earlier call was stopped; or make derived runs.

    Args:
        specs: runs with equal `trajectory`; the parents of derived runs must be done.
        store: receives the runs.
        place: data folder, device, threads.
        forks: steps before which the state is saved, for runs that switch there.
        keep_every: steps between checkpoints that are kept, for averages to be replayed on; None keeps none.
        report: called after each step.

    Raises:
        UserError: the runs are of several trajectories, the parent of a derived run is not done, a run was trained on
            other data, the loss is not finite, or memory is exhausted.
    """
    if len({spec.trajectory.digest for spec in specs}) > 1:
        raise UserError(f"specs must be of one trajectory, got {len(specs)} runs of several: train them separately.")
    check_data(map(store.run, specs), place)
    for spec in specs:
        if spec.derived:
            derive(spec, store, place)
    runs = [run for run in map(store.run, specs) if not run.done]
    if runs:
        training = Training(runs, store, place, forks=forks, keep_every=keep_every)
        with loading_data.computing(training.threads):
            training.run(report)


class Training:
    """One call of `train`: the trajectory, its data and its files."""

    def __init__(
        self,
        runs: Sequence[Run],
        store: RunStore,
        place: Place,
        *,
        forks: Collection[int],
        keep_every: int | None = None,
    ) -> None:
        self.runs, self.forks = runs, set(forks)
        self.spec = runs[0].spec.trajectory
        self.kept = self.spec.iterates(keep_every) if keep_every else range(0)
        self.domains = loading_data.domains(self.spec, place)
        self.lineage = runs[0].lineage  # keeps the forks for its children
        self.parent = store.run(self.spec.parent) if self.spec.parent else None
        for run in (*runs, self.lineage):
            run.check_data(self.domains.data.fingerprint)
        place = place.replace(threads=self._threads() or place.threads)
        self.threads = place.threads
        self.device = loading_data.device(place)
        self.judge = Evaluator(self.domains, self.device, self.spec, fitted=self.spec.stop is not None)
        self.trajectory = Trajectory(runs, self.domains, place)
        self.shadow: Network | None = None  # holds averages while they are evaluated
        self._begin(place)

    def run(self, report: JobReport | None) -> None:
        """Make the remaining updates, then write the results."""
        spec, trajectory, network = self.spec, self.trajectory, self.trajectory.network
        objective, rule = objective_of(spec), trajectory.step_rule()
        batches = stream(spec, self.domains, self.device)
        set_training(network, freeze_batchnorm=spec.freeze_batchnorm)
        for step in range(trajectory.next_step, spec.steps + 1):
            if self._reached():
                break
            if step == spec.switch:
                trajectory.switch()
                rule = trajectory.step_rule()
            lr = trajectory.rate(step)
            for act in trajectory.on_step:
                act(step)
            batch = batches.batch(step)
            trajectory.losses.append(self._update(rule, lambda batch=batch, step=step: objective(network, batch, step)))  # type: ignore[misc]
            self._check_losses(step)
            sources = cache(lambda: self.judge.sources(network))  # computed at most once a step, and only if called
            trajectory.after(step, lambda sources=sources: mean(sources(), "loss"))  # type: ignore[misc]
            if step % spec.eval_every == 0 or step == spec.steps:
                self._evaluate(step, sources(), lr)
            self._keep(step)
            if report:
                self._report(report, step)
        self._finish()

    def _reached(self) -> bool:
        """Return whether the spec's stopping criterion holds at the last evaluation."""
        stop, rows = self.spec.stop, self.trajectory.rows
        return bool(stop and rows and rows[-1]["step"] >= stop.after and mean(rows[-1]["fitted"], "loss") <= stop.loss)

    def _report(self, report: JobReport, step: int) -> None:
        """Report a step; an interrupt during the report saves the state first."""
        try:
            report(step + 1, self.spec.steps + 1, self._shown())
        except KeyboardInterrupt:
            self._save()
            raise

    def _update(self, rule: Step, loss: Callable[[], Tensor]) -> Tensor:
        """Make one update in the spec's precision; a batch that does not fit into memory is refused, not split."""
        step = self.trajectory.next_step

        def closure() -> Tensor:
            with seeded("dropout", self.spec.seed, step, device=self.device), self.trajectory.noise or nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "bf16"):
                    value = loss()
                return _backward(value)

        try:
            return rule.step(closure)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise UserError(
                f"Out of memory in training with {count_of(self.spec.batch_size, 'image')} of each source domain on "
                f"{self.device}; take a smaller --batch-size (another run: it is part of its name) or --image-size."
            ) from error

    def _threads(self) -> int | None:
        """Return the number of threads of the state that is resumed or forked: sums depend on it."""
        first = self.parent if self.parent and self._fork().exists() else self.lineage
        threads: int | None = (self.runs[0].provenance or first.provenance).get("threads")
        return threads

    def _fork(self) -> Path:
        """Return the path of the parent's state at the switch."""
        assert self.parent
        return self.parent.state(f"fork-{self.spec.switch}")

    def _begin(self, place: Place) -> None:
        """Resume from a saved state, fork from the parent's at the switch, or start; record which."""
        how = self._take_up()
        self.started = self.saved = time.monotonic()
        self.session = {"from_step": self.trajectory.next_step, "how": how}
        facts = {**place.model_dump(), "device": str(self.device), "machine": environment.facts()}
        for run in self.runs:
            run.create()
            past = run.provenance.get("sessions", [])
            run.note(**facts, data_fingerprint=self.domains.data.fingerprint, sessions=[*past, self._session()])
        if self.forks or self.kept:
            self.lineage.create()
            self.lineage.note(data_fingerprint=self.domains.data.fingerprint, threads=self.threads)

    def _take_up(self) -> str:
        """Restore the state to continue from, if there is one; return which, for the provenance."""
        state = self.runs[0].state("resume")
        if state.exists() and self.trajectory.resume(state):
            return "resumed"
        if self.parent and self._fork().exists():
            self.parent.check_data(self.domains.data.fingerprint)
            self.trajectory.fork(self._fork())
            return f"forked from {self.parent.spec.digest}"
        self.trajectory.prepare(self.domains)
        return "begun again: the saved state lacks one of the averages" if state.exists() else "begun"

    def _session(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self.started, 3)
        return {**self.session, "to_step": self.trajectory.next_step, "seconds": seconds}

    def _check_losses(self, step: int) -> None:
        """Raise at a loss that is not finite, with its step; saved states and checkpoints are kept."""
        due = (step + 1) % CHECK_STEPS == 0 or step % self.spec.eval_every == 0 or step == self.spec.steps
        if self.device.type != "cpu" and not due:
            return
        newest = self.trajectory.losses[-CHECK_STEPS if due else -1 :]
        bad = [i for i, value in enumerate(torch.stack(newest).tolist()) if not math.isfinite(value)]
        if bad:
            raise self._diverged("training", step - len(newest) + 1 + bad[0])

    def _diverged(self, which: str, step: int) -> UserError:
        return UserError(
            f"The {which} loss of run {self.runs[0].spec.digest} is not finite at step {step}; lower --lr. "
            "The checkpoints before it are kept."
        )

    def _evaluate(self, step: int, sources: dict[str, Score], lr: float) -> None:
        """Log the network and the observers that are evaluated during training; keep selected checkpoints."""
        trajectory = self.trajectory
        live = self.judge.row(trajectory.network, step, sources)
        if not math.isfinite(live["validation_loss"]):
            raise self._diverged("validation", step)
        live["train_loss"] = float(torch.stack(trajectory.losses).cpu().double().mean())
        trajectory.losses.clear()
        if self.spec.scheduled:
            live["lr"] = lr
        if trajectory.norms:
            live["gradient_norm"] = float(torch.stack(trajectory.norms).cpu().double().mean())
            trajectory.norms.clear()
        if trajectory.disorder:
            live["disorder"] = trajectory.disorder.row()
        trajectory.rows.append(live)
        for observer in trajectory.observers:
            if observer.average.evaluated:
                own = trajectory.observed and observer.run.spec.average.kind != "last"
                weights = observer.average.result() if own else trajectory.network.state_dict()
                row = self.judge.row(self._averaged(weights), step) if own else live
                self._log(observer, row, weights)

    def _averaged(self, weights: dict[str, Tensor]) -> Network:
        """Return a copy of the network that holds these weights."""
        if self.shadow is None or len(self.shadow.state_dict()) != len(weights):  # the switch adds step sizes
            self.shadow = copy.deepcopy(self.trajectory.network)
        self.shadow.load_state_dict(weights)
        return self.shadow

    def _log(self, observer: Observer, row: Row, weights: dict[str, Tensor]) -> None:
        """Add a row to a run's log, and save its checkpoint if this row is now the selected one."""
        observer.log(row)
        eligible = candidates(observer.rows, self.spec.settled)
        if eligible and training_domain(eligible) is observer.rows[-1]:
            files.save_arrays(observer.run.checkpoint("selected"), arrays(weights), {"step": row["step"]})

    def _keep(self, step: int) -> None:
        """Save a checkpoint or a fork if one is due, and the state at evaluations and every `SAVE_SECONDS`."""
        if step in self.kept:
            files.save_arrays(self.lineage.keep(step), arrays(self.trajectory.network.state_dict()), {"step": step})
        if step + 1 in self.forks:
            self.trajectory.save(self.lineage.state(f"fork-{step + 1}"), observers=[])
        if step % self.spec.eval_every == 0 or time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        self._write_logs()
        self.trajectory.save(self.runs[0].state("resume"), observers=self.trajectory.observers)
        self.saved = time.monotonic()

    def _write_logs(self) -> None:
        for observer in self.trajectory.observers:
            observer.run.write_log(observer.rows)
            observer.run.note(sessions=[*observer.run.provenance["sessions"][:-1], self._session()])

    def _shown(self) -> dict[str, float]:
        losses = self.trajectory.losses
        shown = {"loss": float(losses[-1])} if losses and self.device.type == "cpu" else {}
        if self.trajectory.rows:
            newest = self.trajectory.rows[-1]
            shown["validation"] = newest["validation"]
            if self.spec.target_logged:
                shown["target"] = target_accuracy(newest)
        return shown

    def _finish(self) -> None:
        """Refresh and evaluate averages, write checkpoints and logs, and mark the runs as done."""
        for observer in self.trajectory.observers:
            weights = observer.average.result()
            if not observer.average.evaluated:
                network = self._averaged(weights)
                refresh(network, observer.run.spec, self.domains, self.device)
                weights = network.state_dict()
                self._log(observer, {**self.judge.row(network, self.spec.steps), **observer.average.facts()}, weights)
            last = {"step": self.trajectory.next_step - 1}
            files.save_arrays(observer.run.checkpoint("last"), arrays(weights), last)
        self._write_logs()
        for run in reversed(self.runs):  # the first holds the state, so it is marked last, before the state is deleted
            run.finish()
        self.runs[0].state("resume").unlink(missing_ok=True)


def _backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
