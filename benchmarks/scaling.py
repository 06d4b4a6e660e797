"""What do many runs cost? Time to list and plan N finished runs, bytes of the store, overhead of an engine per job.

    python benchmarks/scaling.py [--runs 250 500 1000 2000] [--jobs 1 50 200] [--executors local ray]

One run is trained; the others are written by the classes of the store with its log and checkpoints of the same size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from flatlab import environment, files
from flatlab.jobs import engine as engines
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.plan import WorkPlan
from flatlab.specs.engine import Engine
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.run import Place, RunSpec
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore
from flatlab.train.loop import train

HERE = Path(__file__).parent
SIZES = {"rot0": 450, "rot15": 449, "rot30": 449, "rot45": 449}
GOAL = 5.0  # seconds to list, and to plan, 2,160 runs


def specs(count: int) -> list[RunSpec]:
    """Return the specs of as many runs, which differ by their seeds."""
    return [compose(METHODS["ERM"], SMOKE, held_out="rot45", seed=seed, trial_seed=0) for seed in range(count)]


def fill(store: RunStore, wanted: list[RunSpec]) -> None:
    """Train the first of these runs, and write the others as finished with its files."""
    first, *others = map(store.run, wanted)
    if not first.done:
        train([first.spec], store, Place(device="cpu"))
    for run in others:
        if run.done:
            continue
        run.create()
        run.write_log(first.rows())
        for name in ("selected", "last"):
            files.save_arrays(run.checkpoint(name), *files.load_arrays(first.checkpoint(name)))
        run.note(**first.provenance)
        run.finish()


def seconds(act: Callable[[], object]) -> float:
    """Return the least of three times of an act, which other processes on the machine disturb the least."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return min(found)


def of_store(store: RunStore, wanted: list[RunSpec]) -> dict[str, float]:
    """Return the cost of a store with these runs."""
    fill(store, wanted)
    command = [sys.executable, "-m", "flatlab", "runs", "list", "--json", "--store", str(store.root)]
    todo = jobs_plan.missing(store, wanted, [], sizes=SIZES)
    assert not todo
    return {
        "runs": len(wanted),
        "megabytes": sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) / 1e6,
        "files": sum(path.is_file() for path in store.root.rglob("*")),
        "list_seconds": seconds(lambda: subprocess.run(command, check=True, capture_output=True)),
        "plan_seconds": seconds(lambda: jobs_plan.missing(store, wanted, [], sizes=SIZES)),
        "plan_all_missing_seconds": seconds(
            lambda: jobs_plan.missing(RunStore(store.root / "none"), wanted, [], sizes=SIZES)
        ),
    }


def of_engine(executor: str, store: RunStore, wanted: list[RunSpec]) -> dict[str, float | str]:
    """Return the seconds in which an engine passes through jobs whose runs are finished: start included."""
    todo = jobs_plan.missing(RunStore(store.root / "none"), wanted, [], sizes=SIZES)
    plan = WorkPlan(store=str(store.root.resolve()), place=Place(device="cpu"), jobs=tuple(todo))
    started = time.perf_counter()
    errors = engines.run(plan, Engine(executor=executor, workers=2), on_event=lambda event: None)
    assert errors == []
    return {"executor": executor, "jobs": len(todo), "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 50, 200])
    parser.add_argument("--executors", nargs="+", default=["local"], choices=["local", "slurm", "ray"])
    parser.add_argument("--work", type=Path, help="folder of the store, shared by the nodes (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(asked.work or folder)
        stores = [of_store(store, specs(count)) for count in sorted(asked.runs)]
        passed = [of_engine(name, store, specs(count)) for name in asked.executors for count in asked.jobs]
    asked.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": environment.facts(), "goal_seconds": GOAL, "stores": stores, "engines": passed}
    (asked.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
