"""Do the intervals hold? Sample each problem until the accuracy is reached, a thousand times; count the hits.

    python benchmarks/coverage.py [--repetitions 1000] [--only network] [--quick]

What is done is kept under --work, and not done again.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import problems
import torch

from flatlab import environment
from flatlab.metrics.flatness.compare import compare_flatness, paired_difference
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.sphere import sample, sphere_flatness
from flatlab.results.estimate import Sampled

HERE = Path(__file__).parent
CHUNK = 25  # repetitions kept in one file
ABS_ERROR = 1e-5  # nats: out of the way of the relative error
ERRORS = {("quadratics", "difference"): 0.02, ("softmax", "difference"): 0.02}
LOWEST, HIGHEST = 0.93, 0.97  # what 95 % may be, over 1,000 repetitions


@dataclass(frozen=True)
class Case:
    """One row of the table, but for the radius."""

    problem: str
    what: str  # "value" or "difference"
    plan: str  # "blocks of 16" or "piloted"

    @property
    def rel_error(self) -> float:
        """Asked for; differences of small networks stop at the least number of visits unless it is small."""
        return ERRORS.get((self.problem, self.what), 0.05)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.problem}-{self.what}-{self.plan}".replace(" ", "")


CASES = [
    Case(problem, what, plan)
    for problem in problems.PROBLEMS
    for what in ("value", "difference")
    for plan in ("blocks of 16", "piloted")
]


@lru_cache(maxsize=1)
def built(name: str) -> problems.Problem:
    return problems.PROBLEMS[name]()


def truth(name: str, work: Path) -> problems.Truth:
    """Return what is known of a problem; a reference is kept."""
    path = work / f"truth-{name}.npz"
    if not path.exists():
        save(path, **asdict(built(name).truth()))
    with np.load(path) as kept:
        return problems.Truth(**kept)


def save(path: Path, **arrays: object) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(part, **arrays)
    part.rename(path)


def measure(case: Case, radii: np.ndarray, seed: int) -> Sampled:
    """Measure once, as a user would."""
    a, b = built(case.problem).landscapes
    errors = {"rel_error": case.rel_error, "abs_error": ABS_ERROR, "seed": seed}
    if case.plan == "piloted":
        return sphere_flatness(a, radii, **errors) if case.what == "value" else compare_flatness(a, b, radii, **errors)
    if case.what == "value":
        sampler = Sampler([a], seed, "none")
        return sample(sampler, radii, None, (case.rel_error, ABS_ERROR), None, block_size=16)[0]
    sampler = Sampler([a, b], seed, "none", value=lambda rises: rises[0] - rises[1])
    return paired_difference(*sample(sampler, radii, None, (case.rel_error, ABS_ERROR), None, block_size=16))


def repeat(job: tuple[Case, int, Path]) -> None:
    """Make one chunk of repetitions and keep it."""
    case, chunk, work = job
    path = work / "repetitions" / f"{case.name}-{chunk:04d}.npz"
    if path.exists():
        return
    torch.set_num_threads(1)
    known, rows = truth(case.problem, work), []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        found = measure(case, known.radii, seed)
        side = found if case.what == "value" else found.a
        low, high = found.interval()
        visits, blocks = [len(each) for each in side.visits], side.blocks
        freedom, asked = [each.freedom for each in found.estimates], [why == "accuracy" for why in side.stopped]
        images = np.full(len(low), found.cost.images / len(low))
        rows.append([found.value, found.stderr, low, high, visits, blocks, freedom, asked, images])
    save(path, rows=np.array(rows, dtype=float))


FIELDS = ("value", "stderr", "low", "high", "visits", "blocks", "freedom", "accuracy", "images")


def kept(case: Case, work: Path) -> list[Path]:
    """Return the files of the repetitions that were made."""
    return sorted((work / "repetitions").glob(f"{case.name}-*.npz"))


def summarise(case: Case, repetitions: int, work: Path) -> Iterator[dict[str, object]]:
    """Yield a row for each radius."""
    known = truth(case.problem, work)
    table = np.concatenate([np.load(path)["rows"] for path in kept(case, work)])[:repetitions]
    true = known.value if case.what == "value" else known.difference
    error = known.stderr if case.what == "value" else known.difference_stderr
    for r, radius in enumerate(known.radii):
        got = dict(zip(FIELDS, table[:, :, r].T, strict=True))
        inside = (got["low"] <= true[r]) & (true[r] <= got["high"])
        share = float(inside.mean())
        yield {
            **asdict(case),
            "rel_error": case.rel_error,
            "radius": float(radius),
            "F": float(known.value[r]),
            "truth": float(true[r]),
            "truth_stderr_over_stderr": float(error[r] / got["stderr"].mean()),
            "repetitions": len(inside),
            "coverage": share,
            "coverage_stderr": float(np.sqrt(share * (1 - share) / len(inside))),
            "below": float((got["high"] < true[r]).mean()),
            "above": float((got["low"] > true[r]).mean()),
            "bias_over_stderr": float((got["value"].mean() - true[r]) / got["value"].std()),
            "spread_over_stderr": float(got["value"].std() / np.sqrt((got["stderr"] ** 2).mean())),
            "relative_error": float(np.mean(np.abs(got["value"] - true[r])) / known.value[r]),
            "visits": float(np.median(got["visits"])),
            "blocks": float(np.median(got["blocks"])),
            "stopped_by_accuracy": float(got["accuracy"].mean()),
            "images": float(got["images"].mean()),
            "holds": LOWEST <= share <= HIGHEST,
        }


def measured(case: Case, given: argparse.Namespace) -> list[dict[str, object]]:
    """Return the rows of a case: from its repetitions, or where none are at hand as they were written before."""
    if kept(case, given.work):
        return list(summarise(case, given.repetitions, given.work))
    path = given.out / "coverage.json"
    written = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in written if asdict(case).items() <= row.items()]


def markdown(rows: list[dict[str, object]]) -> str:
    """Return the table of the documentation."""
    heads = (
        "problem",
        "number",
        "plan",
        "F",
        "asked",
        "visits",
        "repetitions",
        "coverage of 95 %",
        "true below / above",
        "mean error",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        mark = "" if row["holds"] else " (missed)"
        cells = (
            row["problem"],
            row["what"],
            row["plan"],
            f"{row['F']:.3g}",
            f"{row['rel_error']:.0%}",
            f"{row['visits']:.0f}",
            f"{row['repetitions']:,}",
            f"{100 * row['coverage']:.1f} ± {100 * row['coverage_stderr']:.1f}{mark}",
            f"{100 * row['above']:.1f} / {100 * row['below']:.1f}",
            f"{100 * row['relative_error']:.1f} % of F",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(rows: list[dict[str, object]], out: Path) -> None:
    """Write coverage.md and coverage.json."""
    missed = sum(not row["holds"] for row in rows)
    text = [
        "# Coverage of the 95 % intervals, after stopping\n",
        f"Repetitions have the seeds from 0 on; goal: 93 to 97 % of 1,000; {missed} of {len(rows)} rows lie outside.",
        'The number is F of one model ("value") or the paired difference of two ("difference"), measured until its',
        "standard error is the asked share of F. True below: the truth lay below the interval. Errors are binomial.\n",
        markdown(rows),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "coverage.md").write_text("\n".join(text) + "\n")
    facts = {"machine": environment.facts(), "threads": 1, "rows": rows}
    (out / "coverage.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "coverage")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--processes", type=int, default=environment.cores())
    parser.add_argument("--quick", action="store_true", help="50 repetitions of the quadratics: a smoke check")
    given = parser.parse_args()
    start, cases = time.monotonic(), [case for case in CASES if given.only in case.name]
    if given.quick:
        given.repetitions, cases = 50, [case for case in cases if case.problem == "quadratics"]
    os.environ["OMP_NUM_THREADS"] = "1"
    chunks = range(-(-given.repetitions // CHUNK))  # of all cases in turn: what is stopped early has some of each
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        pool.starmap(truth, [(name, given.work) for name in dict.fromkeys(case.problem for case in cases)], 1)
        jobs = [(case, chunk, given.work) for chunk in chunks for case in cases]
        for done, _ in enumerate(pool.imap_unordered(repeat, jobs), 1):
            print(f"{done}/{len(jobs)} {time.monotonic() - start:.0f} s", flush=True)
    rows = [row for case in CASES for row in measured(case, given)]
    write(rows, given.out)
    print(markdown(rows))


if __name__ == "__main__":
    main()
