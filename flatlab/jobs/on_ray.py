"""Jobs as tasks of Ray: Ray places them, orders them by their needs, and retries them if a node fails."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flatlab.errors import UserError
from flatlab.jobs.local import ALLOCATOR
from flatlab.jobs.plan import Event, Job, OnEvent, WorkPlan
from flatlab.jobs.submission import Submission
from flatlab.specs.engine import Engine
from flatlab.store.disk import require_shared_locks
from flatlab.store.entry import discard
from flatlab.store.runs import RunStore

SETTINGS = {  # of Ray, read when it is imported
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a task that requests no GPU has none
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # where `uv run` started the command, nodes have their own environments
}
RETRIES = 10  # of a task whose node or process was lost
GB = 2**30


def run_on_ray(plan: WorkPlan, engine: Engine, *, on_event: OnEvent) -> list[Event]:
    """Run each job of a plan as a task of Ray, and wait.

    Args:
        plan: the jobs, their store and place.
        engine: what each task gets, and the cluster's address.
        on_event: called with each event of each task.

    Returns:
        The errors, as events.

    Raises:
        UserError: if Ray is not installed or does not start, or no cluster answers at the address.
    """
    if find_spec("ray") is None:
        raise UserError("--executor ray needs a package that is not installed: pip install 'flatlab[ray]'.")
    submission = Submission.create(plan)
    try:
        with _cluster(engine) as ray:
            tasks = _Tasks(ray, _started(submission.folder, plan, _remote(ray, engine)), on_event)
            errors = submission.follow(plan, tasks.alive, on_event)
            return [*tasks.raised.values(), *(each for each in errors if each["job"] not in tasks.raised)]
    finally:
        discard(submission.folder)


@contextmanager
def _cluster(engine: Engine) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine; a started one is stopped."""
    os.environ |= SETTINGS
    import ray

    own = {} if engine.ray_address else {"num_cpus": engine.workers * engine.cpus, "include_dashboard": False}
    try:
        ray.init(address=engine.ray_address or "local", log_to_driver=False, logging_level="error", **own)
    except Exception as error:  # Ray raises plain ones, for example if a node does not start in time
        wanted = (
            f"--ray-address must be that of a running Ray cluster, such as auto, got {engine.ray_address}"
            if engine.ray_address
            else "Ray did not start on this machine"
        )
        raise UserError(f"{wanted}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _remote(ray: Any, engine: Engine) -> Any:
    """Return the remote function of a job with the resources that it requests."""
    memory = {"memory": engine.memory * GB} if engine.memory else {}
    return ray.remote(do).options(
        num_cpus=engine.cpus,
        num_gpus=engine.gpus,
        max_retries=RETRIES,
        runtime_env={"env_vars": ALLOCATOR},
        **memory,
    )


def _started(folder: Path, plan: WorkPlan, remote: Any) -> dict[str, Any]:
    """Start a task for each job, with those that it needs as arguments; return them by the job's name."""
    made_by = {name: job for job in plan.jobs for name in job.fills}
    index = {job.name: i for i, job in enumerate(plan.jobs)}
    tasks: dict[str, Any] = {}

    def start(job: Job) -> Any:
        if job.name not in tasks:
            needs = {made_by[name].name: made_by[name] for name in job.needs if name in made_by}
            own = plan.replace(jobs=(job,)).canonical()  # the whole plan would be read once for each of its jobs
            tasks[job.name] = remote.remote(str(folder), index[job.name], own, *map(start, needs.values()))
        return tasks[job.name]

    for job in plan.jobs:
        start(job)
    return tasks


def do(folder: str, index: int, text: str, *_: Any) -> None:
    """Do one job of a plan on the node that runs this; its events go to a file of the submission.

    Args:
        folder: of the submission.
        index: of the job in the plan.
        text: a plan of this job alone, as JSON.

    Raises:
        UserError: where the node does not see the store, or its disk has no locks across nodes.
    """
    from flatlab.jobs.worker import work

    submission = Submission(Path(folder))
    if not submission.folder.is_dir():
        raise UserError(
            f"Node {platform.node()} does not see {submission.folder}: --store must name a folder that all nodes mount "
            "at the same path."
        )
    plan = WorkPlan.parse(text)
    require_shared_locks(Path(plan.store))
    with open(submission.events(index), "a") as events:

        def emit(event: Event) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        work(plan.jobs, RunStore(plan.store), plan.place, emit=emit, failures=submission.folder)


class _Tasks:
    """Tasks that were started, and what they raised."""

    def __init__(self, ray: Any, by_name: dict[str, Any], on_event: OnEvent) -> None:
        self.ray, self.waiting, self.on_event = ray, {task: name for name, task in by_name.items()}, on_event
        self.raised: dict[str, Event] = {}

    def alive(self) -> bool:
        """Whether a task is not over; what a task raised is noted at once."""
        over = self.ray.wait(list(self.waiting), num_returns=len(self.waiting), timeout=0)[0] if self.waiting else []
        for task in over:
            name = self.waiting.pop(task)
            try:
                self.ray.get(task)
            except self.ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                sentence = str(cause if isinstance(cause, UserError) else error).strip().splitlines()[-1]
                if sentence not in {event["error"] for event in self.raised.values()}:
                    self.on_event({"job": "worker", "note": f"{name}: {sentence}"})
                self.raised[name] = {"job": name, "error": sentence}
        return bool(self.waiting)
