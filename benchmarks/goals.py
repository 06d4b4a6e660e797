"""Write each goal beside what was measured, and when, into README.md: from the files in `results/` alone.

python benchmarks/goals.py
"""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- goals.py writes from here -->", "<!-- to here -->"
Line = tuple[str, str, str, bool]  # what, goal, measured, whether it holds


def overhead(found: Any) -> Iterator[Line]:
    """Return the cost of an image in the default measurement, of each network at its worst number of samples."""
    for name in dict.fromkeys(row["network"] for row in found["rows"]):
        row = max((each for each in found["rows"] if each["network"] == name), key=lambda each: each["ratio"])
        what = f"time of an image in `sphere_flatness` over a bare pass: {row['parameters']:,} parameters"
        yield (
            what,
            f"at most {found['goal']:g}",
            f"{row['ratio']:.2f}, N = {row['samples']:,}",
            row["ratio"] <= found["goal"],
        )
    yield from crossed(found)


def crossed(found: Any) -> Iterator[Line]:
    """Return the least advantage over the crossed design, in time for the same standard errors."""
    row = min((each for each in found["rows"] if each["crossed"]), key=lambda each: each["crossed"])
    shown = f"{row['crossed']:.1f}, {row['parameters']:,} parameters, N = {row['samples']:,}"
    what = "time of the crossed design for the same standard errors, over that of the default: the least of all"
    yield what, "at least 1", shown, row["crossed"] >= 1


def point(found: Any) -> Iterator[Line]:
    """Return the cost of a point of a large network, and the memory."""
    middle, low, high = found["points"]["six radii"]
    what = f"a point over a bare pass, each direction at six radii: {found['parameters']:,} parameters"
    yield what, f"at most {found['goal']:g}", f"{middle:.2f} [{low:.2f}, {high:.2f}]", middle <= found["goal"]
    vectors, most = found["vectors"], found["goal_vectors"]
    holds = round(vectors, 2) <= most  # a few bytes more are the scalars of the losses
    yield "memory for that, in vectors of the parameters", f"at most {most}", f"{vectors:.1f}", holds


def flatness(found: Any) -> Iterator[Line]:
    """Return how many times fewer images than the plain procedure flatness to 2 % takes."""
    for row in found["rows"]:
        goal = 150 if row["images"] > 4000 else 40
        low, high = row["geometric_mean_90"]
        what = f"images of the plain procedure over ours, to 2 %: {row['words'].split(' (')[0]}, N = {row['images']:,}"
        shown = f"{row['geometric_mean']:.0f} [{low:.0f}, {high:.0f}]; in time {row['wall_ratio']:.0f}"
        yield what, f"at least {goal}", shown, row["geometric_mean"] >= goal


def coverage(found: Any) -> Iterator[Line]:
    """Return the range of the intervals' coverage."""
    each = [row["coverage"] for row in found["rows"]]
    shown = f"{min(each):.1%} to {max(each):.1%} in {len(each)} rows"
    yield "coverage of 95 % intervals after stopping", "93 to 97 %", shown, min(each) >= 0.93 and max(each) <= 0.97


def curvature(found: Any) -> Iterator[Line]:
    """Return the goals of one part: products, eigenvalues, traces or surfaces of a network."""
    for each in found["goals"]:
        goal = f"at {'least' if each['least'] else 'most'} {each['bound']:g}"
        yield f"{found['problem']}: {each['goal']}", goal, f"{each['measured']:.4g}", each["holds"]


def quantizers(found: Any) -> Iterator[Line]:
    """Return the cost of a step of LSQ training."""
    for size, rows in found["rows"].items():
        ours = next(row for row in rows if row["variant"] == "flatlab")
        shown = f"{ours['ratio']:.3f} [{ours['low']:.3f}, {ours['high']:.3f}]"
        what = f"a step of LSQ training over full precision: MobileNetV2, {size} pixels"
        yield what, "at most 1.15", shown, ours["ratio"] <= 1.15


def job(found: Any) -> Iterator[Line]:
    """Return the cost of a whole job."""
    for name, (ratio, goal) in found["ratios"].items():
        what = f"`reproduce fig3` at {found['setting']}, processor time: {name}"
        yield what, f"at most {goal:g}", f"{ratio:.2f}", ratio <= goal
    if whole := found.get("all"):
        what = f"`reproduce all` at {found['setting']} from an empty store, two workers, minutes on that machine"
        yield what, f"at most {whole['goal']}", f"{whole['minutes']:.1f}", whole["minutes"] <= whole["goal"]


def scaling(found: Any) -> Iterator[Line]:
    """Return the processor time of listing and planning the largest store."""
    row = max(found["stores"], key=lambda each: each["runs"])
    for name, what in (("list", "`runs list`"), ("plan", "the plan of `reproduce qgen --setting paper`")):
        seconds = row[f"{name} processor"]
        yield (
            f"{what} with {row['runs']:,} runs, s",
            f"at most {found['goal']:g}",
            f"{seconds:.1f}",
            seconds <= found["goal"],
        )


def training_on_a_gpu(found: Any) -> Iterator[Line]:
    """Return the speed of training over that with one constant batch."""
    share, (low, high) = found["flatlab"]["share"], found["flatlab"]["rounds"]
    yield (
        f"training of {found['model']} in {found['precision']} on an {found['card']}, over the no-data limit",
        f"at least {found['goal']:.0%}",
        f"{share:.1%} [{low:.1%}, {high:.1%}]",
        share >= found["goal"],
    )


PAGES: dict[str, Callable[[Any], Iterator[Line]]] = {
    "overhead": overhead,
    "point": point,
    "flatness": flatness,
    "coverage": coverage,
    "curvature": curvature,
    "quantizers": quantizers,
    "job": job,
    "scaling": scaling,
    "training-gpu": training_on_a_gpu,
}
MISSING = "On a GPU (`gpu.py`): 70 % of the throughput of bare compiled forward passes; F to 2 % at 13 radii in minutes"


def measured_on(path: Path) -> str:
    """Return the day of the commit that last changed a file of results; empty if it is in none."""
    command = ["git", "log", "-1", "--format=%as", "--", path.name]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=True).stdout.strip()


def table() -> list[str]:
    """Return the lines of the table."""
    lines = ["| | goal | measured | | when |", "|---|---|---|---|---|"]
    for name, read in PAGES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            lines.append(f"| all of `{name}.py` | | not measured | | |")
            continue
        found = json.loads(path.read_text())
        for part in found if isinstance(found, list) else [found]:
            day = part.get("facts", {}).get("when") or measured_on(path)
            for what, goal, shown, holds in read(part):
                lines.append(f"| {what} | {goal} | {shown} | {'holds' if holds else '**missed**'} | {day} |")
    return [*lines, f"| {MISSING} | | not measured | | |"]


def main() -> None:
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, *table(), END]) + after)


if __name__ == "__main__":
    main()
