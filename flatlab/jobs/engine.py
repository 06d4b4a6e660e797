"""Run a plan on an engine: processes on this machine, Slurm or Ray."""

from pathlib import Path

from flatlab.jobs import local
from flatlab.jobs.plan import Event, OnEvent, WorkPlan
from flatlab.specs.engine import Engine
from flatlab.store.disk import require_shared_locks


def run(plan: WorkPlan, engine: Engine, *, on_event: OnEvent) -> list[Event]:
    """Run a plan's jobs on an engine, and wait.

    Args:
        plan: the jobs, their store and place.
        engine: local processes or Slurm, and the number of workers.
        on_event: called with each event of each worker.

    Returns:
        The errors, as events.

    Raises:
        UserError: if the engine is not available, or the store's disk has no locks across nodes.
    """
    if engine.executor == "local":
        return local.run_locally(plan, workers=engine.workers, on_event=on_event)
    require_shared_locks(Path(plan.store))
    if engine.executor == "slurm":
        from flatlab.jobs.slurm import run_on_slurm as start
    else:
        from flatlab.jobs.on_ray import run_on_ray as start
    return start(plan.replace(place=plan.place.replace(threads=engine.cpus)), engine, on_event=on_event)
