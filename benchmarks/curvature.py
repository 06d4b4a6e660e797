"""Curvature side by side with other tools: a product, the top 10 eigenvalues, the trace, a surface's point, memory.

    python benchmarks/curvature.py [PART ...] [--problems digits resnet20 mobilenet] [--quick]

Each part of each problem runs in a process of its own, with the allocator's setting that flatlab gives its workers
(but `users`). What is done is kept under --work, and not done again. Times are medians of interleaved calls.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import contests
import networks
import peers
import subjects
import torch

from flatlab import environment as flatlab_environment
from flatlab.jobs.local import ALLOCATOR

HERE = Path(__file__).parent
COUNTS = {"samples": 512, "batch": 128, "few": 64, "steps": 400, "repeats": 7, "seeds": 3, "products": 40}
COUNTS |= {"reference": 400, "probes": 200, "threads": 1, "most": 50}
LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # of SciPy's and NumPy's algebra
QUICK = {"samples": 64, "batch": 16, "few": 16, "steps": 20, "repeats": 1, "seeds": 1, "products": 11}
QUICK |= {"reference": 30, "probes": 20, "most": 2}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(contests.PARTS))
    parser.add_argument("--problems", nargs="+", default=list(networks.PROBLEMS))
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shared", type=Path, default=subjects.SHARED, help="folder of PACS and the weights")
    parser.add_argument("--quick", action="store_true", help="few images, one repetition: a smoke check")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    for name, value in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"{value} by default")
    given = parser.parse_args()
    for name, value in (COUNTS | QUICK if given.quick else COUNTS).items():
        setattr(given, name, value if getattr(given, name) is None else getattr(given, name))
    known = {*contests.PARTS, *networks.PROBLEMS, "resnet50"}  # whose memory alone is measured
    if unknown := {*given.parts, *given.problems} - known:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return given


def kept(given):
    return given.work / ("curvature-quick" if given.quick else "curvature")


def measure(given):
    """Measure one part of one problem, in this process, and keep it."""
    torch.set_num_threads(given.threads)
    (problem,), (part,) = given.problems, given.parts
    made = None if problem == "resnet50" else networks.PROBLEMS[problem](given)
    found = contests.PARTS[part](made, given)
    counts = {name: getattr(given, name) for name in COUNTS}
    facts = {"machine": flatlab_environment.facts(), "peers": peers.versions(), **counts, "load": os.getloadavg()[0]}
    facts |= {"when": date.today().isoformat()}
    given.child.write_text(json.dumps({"problem": problem, "part": part, **found, "facts": facts}, indent=1))


def run(given, problem, part):
    """Have a part measured by a process of its own, unless it is kept."""
    path = kept(given) / f"{problem}-{part}.json"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"{problem}, {part} ...", flush=True)
    told = [option for name in COUNTS for option in (f"--{name}", str(getattr(given, name)))]
    told += ["--work", str(given.work), "--shared", str(given.shared), "--child", str(path.with_suffix(".part"))]
    plain = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    environment = plain if part == "users" else plain | ALLOCATOR
    environment |= dict.fromkeys(LIBRARIES, str(given.threads))  # those of torch are set in the process
    command = [sys.executable, __file__, part, "--problems", problem, *told]
    if subprocess.run(command, env=environment).returncode:
        print(f"{problem}, {part}: failed", flush=True)
        return
    path.with_suffix(".part").rename(path)


# ----------------------------------------------------------------------------------------------------------- the page


def page(parts):
    lines = ["# Curvature and surfaces, side by side\n", "## Goals\n"]
    lines += ["| network | what | goal | measured | |", "|---|---|---|---|---|"]
    for each in parts:
        lines += [_goal(each["problem"], goal) for goal in each["goals"]]
    for each in parts:
        counts = ", ".join(f"{name} {each['facts'][name]}" for name in ("samples", "batch", "threads"))
        lines += [f"\n## {each['problem']}: {each['part']}\n", *_table(each["rows"]), f"\n{counts}."]
        lines += [f"{note}." for note in each["notes"]]
    return "\n".join(lines) + "\n"


def _goal(problem, goal):
    sign, verdict = ("at least" if goal["least"] else "at most"), ("holds" if goal["holds"] else "**missed**")
    return f"| {problem} | {goal['goal']} | {sign} {goal['bound']:g} | {goal['measured']:.4g} | {verdict} |"


def _table(rows):
    """Return a table; seconds of this machine stay in the JSON."""
    names = [name for name in rows[0] if name not in ("seconds", "milliseconds")]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return lines + ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]


def _cell(value):
    return value if isinstance(value, str) else "" if value is None else f"{value:.3g}"


def write(given):
    order = {problem: place for place, problem in enumerate((*networks.PROBLEMS, "resnet50"))}
    parts = [json.loads(path.read_text()) for path in kept(given).glob("*-*.json")]
    parts.sort(key=lambda each: (list(contests.PARTS).index(each["part"]), order[each["problem"]]))
    out = given.out or (kept(given) if given.quick else HERE / "results")
    out.mkdir(parents=True, exist_ok=True)
    (out / "curvature.md").write_text(page(parts))
    (out / "curvature.json").write_text(json.dumps(parts, indent=1) + "\n")
    print(page(parts))


def main():
    given = arguments()
    if given.child:
        return measure(given)
    wanted = given.parts or list(contests.PARTS)
    for problem in given.problems:
        for part in wanted:
            if part != "memory":
                run(given, problem, part)
    if "memory" in wanted:
        run(given, "resnet50", "memory")
    return write(given)


if __name__ == "__main__":
    main()
