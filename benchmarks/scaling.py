"""What do many runs cost? The time to list and to plan them, the size of their store, and what an engine adds to a job.

    python benchmarks/scaling.py                                    # stores of 540, 1,080 and 2,160 runs; 200 jobs
    python benchmarks/scaling.py --runs --executors slurm --own-slurm --jobs 1 20 200    # a part of it

Stores hold the runs of `reproduce qgen --setting paper` with their measurements, written without training
(`finished.py`). Jobs sleep (`idle/`), and write a finished run each: what is measured is what is around them.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import finished
import numpy as np
from PIL import Image

from flatlab import environment, reproduce
from flatlab.data import fingerprints
from flatlab.data.catalog import CATALOG
from flatlab.jobs import engine as engines
from flatlab.jobs import plan as jobs_plan
from flatlab.jobs.plan import WorkPlan
from flatlab.specs.engine import Engine
from flatlab.specs.methods import METHODS, compose
from flatlab.specs.run import Place
from flatlab.specs.settings import PAPER, SMOKE
from flatlab.store.runs import RunStore

HERE = Path(__file__).parent
SIZES = {"rot0": 450, "rot15": 449, "rot30": 449, "rot45": 449}
GOAL = 5.0  # seconds to list, and to plan, 2,160 runs
MANY = 100_000  # runs, on paper
QUOTA = 1_000_000  # files that many clusters allow a user
WORKERS = 2
PATIENCE = 30.0  # seconds for workers to end
Row = dict[str, Any]


def photographs(folder: Path) -> Path:
    """Return a folder in the layout of PACS with one small image of each class."""
    facts = CATALOG["PACS"]
    for domain, kind in itertools.product(facts.domains, facts.classes):
        (folder / domain / kind).mkdir(parents=True, exist_ok=True)
        if not (path := folder / domain / kind / "1.png").exists():
            Image.new("RGB", (8, 8)).save(path)
    return folder


def stored(work: Path, count: int, rounds: int) -> Row:
    """Return the cost of a store with the first runs of qgen and all their measurements."""
    store, data, cache = RunStore(work / "qgen"), photographs(work / "PACS"), work / "cache"
    runs, pairs = reproduce.analysis("qgen").plan(PAPER)
    measurements: dict[str, list[Any]] = {}
    for run, each in pairs:
        measurements.setdefault(run.digest, []).append(each)
    found = fingerprints.at_hand("PACS", str(data), str(cache))
    if len(store.folders()) > count:
        shutil.rmtree(store.root)  # of an earlier call: it would be listed instead
    finished.fill(store, [(run, measurements[run.digest]) for run in runs[:count]], fingerprint=str(found))
    written = [path for path in store.root.rglob("*") if path.is_file()]
    listing = cost("runs", "list", "--json", "--store", store.root, rounds=rounds)
    asked = ("--setting", "paper", "--dry-run", "--json", "--data-dir", data, "--cache", cache)
    planning = cost("reproduce", "qgen", *asked, "--store", store.root, rounds=rounds)
    return {
        "runs": count,
        "rounds": rounds,
        "megabytes": sum(path.stat().st_size for path in written) / 1e6,
        "files": len(written),
        **{f"list {name}": value for name, value in listing.items()},
        **{f"plan {name}": value for name, value in planning.items()},
    }


def planned() -> Row:
    """Return the size of the plan of all runs of qgen and their measurements, which each worker reads."""
    runs, pairs = reproduce.analysis("qgen").plan(PAPER)
    todo = jobs_plan.missing(RunStore("none"), runs, pairs, sizes=dict(CATALOG["PACS"].domains))
    plan = WorkPlan(store="none", place=Place(device="cpu"), jobs=tuple(todo))
    return {"runs": len(runs), "jobs": len(todo), "megabytes": len(plan.canonical()) / 1e6}


def cost(*words: object, rounds: int) -> dict[str, float]:
    """Return the least processor time and wall time in seconds of some calls of a command."""
    found = []
    for _ in range(rounds):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "flatlab", *map(str, words)], check=True, capture_output=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
        found.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))
    processor, wall = (min(each) for each in zip(*found, strict=True))
    return {"processor": processor, "wall": wall}


def passed(executor: str, count: int, seconds: float, work: Path) -> Row:
    """Return what an engine adds to jobs of a length.

    Start: until the first job has begun. Each: from the first job's end to the last one's, for each further job and
    worker, less the job's length. End: from the last job's end to that of the command. All in seconds.
    """
    with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:  # a late worker may still write
        store, times = RunStore(Path(folder) / "store"), Path(folder) / "times"
        times.mkdir()
        store.root.mkdir()
        runs = [compose(METHODS["ERM"], SMOKE, held_out="rot45", seed=seed, trial_seed=0) for seed in range(count)]
        todo = jobs_plan.missing(store, runs, [], sizes=SIZES)
        plan = WorkPlan(store=str(store.root.resolve()), place=Place(device="cpu"), jobs=tuple(todo))
        paths = os.pathsep.join([str(HERE / "idle"), str(HERE)])
        os.environ |= {"PYTHONPATH": paths, "FLATLAB_IDLE_SECONDS": str(seconds), "FLATLAB_IDLE_TIMES": str(times)}
        began = time.time()
        errors = engines.run(plan, Engine(executor=executor, workers=WORKERS), on_event=lambda event: None)
        ended = time.time()
        assert errors == [], errors
        ends = sorted(path.stat().st_mtime for path in store.root.glob("*/done"))
        workers = recorded(times, min(WORKERS, count))
    assert len(ends) == count
    row = {"executor": executor, "jobs": count, "length": seconds, "wall": ended - began, "end": ended - ends[-1]}
    row["start"] = ends[0] - began - seconds
    if count > WORKERS:
        row["each"] = (ends[-1] - ends[0]) * len(workers) / (count - len(workers)) - seconds
        busy = sum(ends[-1] - ends[0] for _ in workers)
        row |= {kind: sum(each[kind] for each in workers) / busy for kind in ("locks", "checks", "polls")}
        own = [np.diff(each["processor"]) for each in workers if len(each["processor"]) > 1]
        row["processor"] = float(np.concatenate(own).mean())
    return row


def recorded(folder: Path, count: int) -> list[Row]:
    """Return what workers have written of themselves; on a cluster they end after the command, or never started."""
    until = time.monotonic() + PATIENCE
    while len(found := sorted(folder.glob("*.json"))) < count and time.monotonic() < until:
        time.sleep(0.1)
    return [json.loads(path.read_text()) for path in found]


def growth(stores: list[Row], column: str, count: int) -> float:
    """Return a column at a number of runs, on the line of least squares through the stores."""
    slope, offset = np.polyfit([row["runs"] for row in stores], [row[column] for row in stores], 1)
    return float(offset + slope * count)


def text(record: Row) -> str:
    """Return the tables."""
    stores = of_stores(record["stores"], record["plan"]) if len(record["stores"]) > 2 else []
    lines = ["# Many runs, many jobs\n", record["note"] + "\n", *stores, *of_engines(record["engines"])]
    return "\n".join(line for line in lines if line != "\n") + "\n"


def of_stores(stores: list[Row], plan: Row) -> list[str]:
    last = stores[-1]
    lines = [
        "## A store with the runs of `reproduce qgen --setting paper`, each with its measurements\n",
        f"Seconds of processor time (the least of {last['rounds']}), imports included; goal: under",
        f"{GOAL:g} at {last['runs']:,} runs, growth in proportion to the runs. The plan is always that of all",
        f"{plan['runs']:,} networks. MB are without the weights.\n",
        "| runs | files | MB | `runs list` | `reproduce qgen --dry-run` |",
        "|---|---|---|---|---|",
    ]
    for row in stores:
        cells = f"{row['runs']:,} | {row['files']:,} | {row['megabytes']:,.0f}"
        lines.append(f"| {cells} | {row['list processor']:.2f} | {row['plan processor']:.2f} |")
    met = "met" if max(last["list processor"], last["plan processor"]) < GOAL else "missed"
    slopes = [1000 * (b["list processor"] - a["list processor"]) / (b["runs"] - a["runs"]) for a, b in pairwise(stores)]
    each = last["files"] / last["runs"]
    mega, listing = (growth(stores, name, MANY) for name in ("megabytes", "list processor"))
    jobs, size = (plan[name] * MANY / plan["runs"] for name in ("jobs", "megabytes"))
    lines += [
        f"\nThe goal is {met}. A further run costs `runs list` {', then '.join(f'{own:.2f}' for own in slopes)} ms.\n",
        f"On paper, {MANY:,} runs: {each * MANY / 1e6:.1f} million files, {mega / 1000:.0f} GB without weights,",
        f"{listing:.0f} s for `runs list`; a plan of {jobs:,.0f} jobs has {size:,.0f} MB, which each worker reads at",
        f"its start. The first wall is the number of files: {each:.0f} a run, and {QUOTA:,}, a usual quota, at",
        f"{QUOTA / each:,.0f} runs.\n",
    ]
    return lines


def of_engines(passes: list[Row]) -> list[str]:
    lines = [
        f"## What an engine adds to jobs, {WORKERS} workers\n",
        "Start: until the first job has begun. Each: added to a job, between the first and the last one's end, with",
        "the run that it writes; of it, processor time. Locks, checks of files, polls: shares of the workers' time.\n",
        "| engine | jobs | of | start, s | each, ms | processor, ms | locks | checks | polls | end, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(passes, key=lambda row: (row["executor"], row["length"], row["jobs"])):
        cells = [row["executor"], f"{row['jobs']}", f"{row['length']:g} s", f"{row['start']:.1f}"]
        middle = [f"{1000 * row[name]:.0f}" if name in row else "" for name in ("each", "processor")]
        middle += [f"{row[name]:.2%}" if name in row else "" for name in ("locks", "checks", "polls")]
        lines.append("| " + " | ".join([*cells, *middle, f"{row['end']:.1f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="*", default=[540, 1080, 2160])
    parser.add_argument("--rounds", type=int, default=3, help="calls of each command, of which the least time counts")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 20, 200])
    parser.add_argument("--seconds", type=float, nargs="+", default=[0, 1], help="lengths of the jobs")
    parser.add_argument("--executors", nargs="*", default=["local", "ray"], choices=["local", "slurm", "ray"])
    parser.add_argument("--own-slurm", action="store_true", help="start the Slurm of the tests, as root")
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "scaling", help="seen by all nodes")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    path = asked.out / "scaling.json"
    record: Row = json.loads(path.read_text()) if path.exists() else {"stores": [], "engines": []}
    record |= {"machine": environment.facts(), "goal": GOAL, "workers": WORKERS, "note": asked.note}
    keys = {"stores": ("runs",), "engines": ("executor", "jobs", "length")}

    def keep(part: str, row: Row) -> None:
        """Replace a row of an earlier call, and write all."""
        others = [each for each in record[part] if any(each[key] != row[key] for key in keys[part])]
        record[part] = sorted([*others, row], key=lambda each: [each[key] for key in keys[part]])
        asked.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        path.with_suffix(".md").write_text(text(record))

    record["plan"] = planned() if asked.runs else record.get("plan")
    for count in sorted(asked.runs):
        keep("stores", stored(asked.work, count, asked.rounds))
    with started_slurm() if asked.own_slurm else nullcontext():
        for executor in asked.executors:
            for seconds in asked.seconds:
                for count in asked.jobs:
                    keep("engines", passed(executor, count, seconds, asked.work))
    print(text(record))


def started_slurm():
    """Start the Slurm of the tests."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from slurm_engine import slurm

    return slurm(Path(tempfile.mkdtemp(prefix="slurm-")))


if __name__ == "__main__":
    main()
