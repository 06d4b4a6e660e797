"""Workers on Slurm: one array of identical workers, which share a plan by the locks of the store.

submitit writes the script, and requeues a worker that is preempted or out of time; a worker is the same process as on
one machine, and resumes from the state on disk. Slurm requeues the workers of a failed node.
"""

import json
import shutil
import subprocess
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flatlab.errors import UserError
from flatlab.jobs.local import worker_command, worker_environment
from flatlab.jobs.plan import Event, OnEvent, WorkPlan
from flatlab.jobs.submission import Submission, submissions
from flatlab.jobs.worker import STOPPED
from flatlab.specs.engine import Engine
from flatlab.store.disk import require_shared_locks
from flatlab.store.runs import RunStore

GRACE_SECONDS = 600.0
REQUEUES = 1000  # maximum time-outs of a worker, each of which loses at most a step


def run_on_slurm(plan: WorkPlan, engine: Engine, *, on_event: OnEvent) -> list[Event]:
    """Submit a plan as an array of workers, unless one that covers it is active, and follow it.

    Args:
        plan: the jobs, their store and place.
        engine: number of workers, and the resources of each.
        on_event: called with each event of each worker.

    Returns:
        The errors, as events.

    Raises:
        UserError: if submitit or Slurm is not available, or sbatch refuses the array.
    """
    _needed()
    found = _active(plan)
    submission = found or _submit(plan, engine)
    number = submission.facts["id"]
    sentence = (
        f"Slurm array {number} {'is under way' if found else 'is submitted'}. This command can be stopped, and "
        f"repeated to follow the array; `flatlab jobs cancel {number}` cancels it."
    )
    on_event({"job": "worker", "note": sentence})
    return submission.follow(plan, partial(is_active, number), on_event)


def _needed() -> None:
    if find_spec("submitit") is None:
        raise UserError("--executor slurm needs a package that is not installed: pip install 'flatlab[slurm]'.")
    if shutil.which("sbatch") is None:
        raise UserError("--executor slurm must run on a machine with Slurm's `sbatch`, which is not in PATH.")


def _active(plan: WorkPlan) -> Submission | None:
    """Return the newest active submission whose jobs include all of a plan's."""
    wanted = {name for job in plan.jobs for name in job.fills}
    active = (each for each in reversed(arrays(RunStore(plan.store))) if is_active(each.facts["id"]))
    return next((each for each in active if wanted <= {name for job in each.plan.jobs for name in job.fills}), None)


def arrays(store: RunStore) -> list[Submission]:
    """Return the arrays that were submitted for a store, the oldest first."""
    return [each for each in submissions(store) if each.facts.get("engine") == "slurm"]


def array(store: RunStore, number: str) -> Submission:
    """Return the array with an identifier.

    Raises:
        UserError: if the store has none.
    """
    found = [each for each in arrays(store) if each.facts["id"] == number]
    if not found:
        raise UserError(f"{store.root} has no Slurm array {number}; `flatlab jobs list` shows them all.")
    return found[-1]


def is_active(number: str) -> bool:
    """Whether an array is pending or running; it counts as active if the controller does not answer."""
    asked = _asked("squeue", "--me", "--noheader", "--array", "--format=%F")
    return asked.returncode != 0 or number in asked.stdout.split()


def states(number: str) -> str:
    """Return the states of an array's workers with Slurm's reasons, such as "RUNNING 2, PENDING (Priority) 1"."""
    asked = _asked("squeue", "--me", "--noheader", "--array", "--format=%F|%T|%r")
    if asked.returncode:
        return "unknown: Slurm's controller does not answer"
    mine = [row.split("|")[1:] for row in asked.stdout.splitlines() if row.startswith(f"{number}|")]
    named = [state if reason == "None" else f"{state} ({reason})" for state, reason in mine]
    return ", ".join(f"{each} {named.count(each)}" for each in dict.fromkeys(named)) or "ended"


def cancel(number: str) -> None:
    """Cancel an array; its workers save their trainings and end.

    Args:
        number: Slurm's identifier of the array.

    Raises:
        UserError: if Slurm refuses.
    """
    done = _asked("scancel", number)
    if done.returncode:
        raise UserError(f"Slurm did not cancel {number}: {done.stderr.strip()}")


def _asked(*command: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which(command[0]) is None:
        raise UserError(f"This must run on a machine with Slurm's `{command[0]}`, which is not in PATH.")
    return subprocess.run(command, capture_output=True, text=True)


def _submit(plan: WorkPlan, engine: Engine) -> Submission:
    import submitit
    from submitit.core.utils import FailedJobError

    submission = Submission.create(plan)
    logs = submission.folder / "logs"
    executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=REQUEUES)
    executor.update_parameters(
        name="flatlab",
        timeout_min=engine.time,
        cpus_per_task=engine.cpus,
        slurm_array_parallelism=engine.workers,
        slurm_additional_parameters=dict(each.split("=", 1) for each in engine.slurm_arg),
        **({"gpus_per_node": engine.gpus} if engine.gpus else {}),
        **({"mem_gb": engine.memory} if engine.memory else {}),
        **({"slurm_partition": engine.partition} if engine.partition else {}),
    )
    try:
        jobs = executor.map_array(Worker(str(submission.folder)), range(engine.workers))
    except FailedJobError as error:
        shutil.rmtree(submission.folder)
        raise UserError(f"sbatch refused the workers: {str(error).strip().splitlines()[-1]}") from error
    submission.started(engine="slurm", id=jobs[0].job_id.partition("_")[0], workers=engine.workers)
    return submission


class Worker:
    """The callable that submitit runs on a node: a worker process; `checkpoint` ends it with its state saved."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, index: int) -> None:
        """Run a worker to its end; its events go to a file of the submission."""
        submission = Submission(Path(self.folder))
        plan = submission.plan
        with open(submission.events(index), "a") as events:
            try:
                require_shared_locks(Path(plan.store))
            except UserError as error:
                events.write(json.dumps({"job": "worker", "error": str(error)}) + "\n")
                return
            self._start(events, plan.place.threads)
            code = self._wait()
        if code == STOPPED:  # Slurm sends SIGTERM at the beginning of a preempted job's grace time, and requeues only
            time.sleep(GRACE_SECONDS)  # jobs that it ends itself, or that `checkpoint` returns on SIGUSR2
        if code:
            raise RuntimeError(f"the worker ended with status {code}")  # Slurm shows the task as failed

    def _start(self, events: Any, threads: int) -> None:
        command, environment = worker_command(f"{self.folder}/plan.json"), worker_environment(threads)
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=events, env=environment)
        # A thread waits: the signal's handler interrupts the main one, and must be able to wait itself.
        self.waiting = threading.Thread(target=self.process.wait, daemon=True)
        self.waiting.start()

    def _wait(self) -> int:
        self.waiting.join()
        return int(self.process.returncode)

    def checkpoint(self, index: int) -> Any:
        """End the worker after the current step; return the submission to be requeued."""
        from submitit.helpers import DelayedSubmission

        self.process.terminate()
        self._wait()
        return DelayedSubmission(Worker(self.folder), index)
