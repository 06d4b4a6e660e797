"""What the tests on Slurm and on Ray share: plans, the store of one process, commands that are killed."""

import subprocess
import sys

from stores import ERM, PLACE, PROBE, SIZES, content

from flatlab import files
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs import worker
from flatlab.jobs.plan import WorkPlan
from flatlab.store.runs import RunStore

LONG = ERM.replace(steps=300, eval_every=50)
MANY = PROBE.replace(num_samples=1000)


def planned(store, runs, measurements=()):
    todo = jobs_plan.missing(store, runs, measurements, sizes=SIZES)
    return WorkPlan(store=str(store.root), place=PLACE, jobs=tuple(todo))


def alone(root, runs, measurements=()):
    """Return the store that one undisturbed process makes."""
    store = RunStore(root)
    errors = []
    plan = planned(store, runs, measurements)
    worker.work(plan.jobs, store, PLACE, emit=lambda event: errors.append(event) if "error" in event else None)
    assert errors == []
    return store


def contents(store):
    return {entry.path.name: content(entry) for run in store.runs() for entry in (run, *run.measurements())}


def sessions(store, spec):
    return [(each["from_step"], each["to_step"]) for each in store.run(spec).provenance["sessions"]]


def step_of(store, spec):
    """Return the step of a training's state on disk; 0 where there is none."""
    path = store.run(spec).state("resume")
    return files.load_arrays(path)[1]["next_step"] if path.exists() else 0


SUBMIT = """
import sys
from flatlab.jobs.engine import run
from flatlab.jobs.plan import WorkPlan
from flatlab.specs.engine import Engine
plan = WorkPlan.parse(open(sys.argv[1]).read())
errors = run(plan, Engine.parse(sys.argv[2]), on_event=lambda event: print(event, flush=True))
sys.exit(str(errors) if errors else 0)
"""


def start(plan, path, engine):
    """Start a command that runs a plan; its events go to its standard output."""
    path.write_text(plan.canonical())
    command = [sys.executable, "-c", SUBMIT, str(path), engine.canonical()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def flatlab(*words):
    return subprocess.run([sys.executable, "-m", "flatlab", *map(str, words)], capture_output=True, text=True)


def check_figure_3(store, folder, *words):
    """Check that Figure 3 on a cluster has the bytes of a local command."""
    command = ["reproduce", "fig3", "--setting", "smoke"]
    mine = flatlab(*command, "--store", store.root, "--out", folder, *words)
    assert mine.returncode == 0, mine.stderr
    own = folder / "alone"
    assert flatlab(*command, "--store", own, "--out", folder / "figures").returncode == 0
    assert contents(store) == contents(RunStore(own))
