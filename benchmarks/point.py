"""What does a point of a landscape cost at 22 million parameters, and how much memory?

    python benchmarks/point.py [--rounds 5]      # two minutes of one core

An encoder of MiniLM's size with random weights, 32 word pieces, one batch of 64: processor time that a point adds to
`sphere_flatness`, drawing included, over that of a bare forward pass with the loss, in turns. A direction of 22 million
numbers is drawn once for its points at all radii; the row "one radius" says what it costs where there is one. What a
point adds: the difference of measurements with more and with fewer directions, so that what is done once does not count
(both are too short for the slope at w to be measured). Memory: of all tensors that are alive at a time, beyond those of
a forward pass, with the landscape's own copy of the parameters.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from flatness import pinned
from overhead import Encoder, Pair

import flatlab
from flatlab import environment
from flatlab.derivatives.autograd import one_path

HERE = Path(__file__).parent
GOAL, VECTORS = 1.1, 3
RADII = {"six radii": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), "one radius": (1.0,)}
FEWER, MORE = 2, 3  # directions


def bare(model: torch.nn.Module, data: Pair) -> float:
    """Return the processor time of a forward pass with the loss."""
    started = time.process_time()
    with torch.inference_mode():
        F.cross_entropy(model(data[0]), data[1])
    return time.process_time() - started


def adding(landscape: flatlab.Landscape, radii: tuple[float, ...]) -> float:
    """Return the processor time that a point adds, directions drawn."""
    seconds = []
    for count in (FEWER, MORE):
        started = time.process_time()
        flatlab.sphere_flatness(landscape, list(radii), num_samples=count)
        seconds.append(time.process_time() - started)
    return (seconds[1] - seconds[0]) / (len(radii) * (MORE - FEWER))


def vectors(work: Callable[[], object], count: int) -> float:
    """Return the most memory that tensors made by some work occupy at a time, in vectors of the parameters."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [each.nbytes() for each in seen.profiler.kineto_results.events() if each.name() == "[memory]"]
    return max(accumulate(changes, initial=0)) / (4 * count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    pinned()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, words = Encoder().eval(), torch.randint(30_522, (64, 32))
    data = words, words[:, 0] % 2
    count = sum(each.numel() for each in model.parameters())
    bare(model, data)
    landscape = flatlab.Landscape(model, [data], F.cross_entropy)
    with one_path():  # the attention that a landscape uses
        passes = vectors(lambda: bare(model, data), count)
    six = list(RADII["six radii"])
    added = 1 + vectors(lambda: flatlab.sphere_flatness(landscape, six, num_samples=2), count) - passes
    ratios: dict[str, list[float]] = {name: [] for name in RADII}
    for _ in range(asked.rounds):
        for name, radii in RADII.items():
            first, ours, second = bare(model, data), adding(landscape, radii), bare(model, data)
            ratios[name].append(2 * ours / (first + second))
    rows = {name: [statistics.median(each), min(each), max(each)] for name, each in ratios.items()}
    result = {"machine": environment.facts(), "parameters": count, "rounds": asked.rounds, "goal": GOAL}
    result |= {"points": rows, "vectors": added, "goal_vectors": VECTORS}
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "point.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "# What a point costs at 22 million parameters",
        "",
        f"{count:,} parameters, 32 word pieces, a batch of 64, one thread: processor time over a bare forward pass",
        f"with the loss, medians of {asked.rounds} interleaved rounds, with least and largest. Goal: at most {GOAL}.",
        "",
        "| each direction | a point over a bare pass |",
        "|---|---|",
        *(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) |" for name, (middle, low, high) in rows.items()),
        "",
        f"Memory above model and data: {added:.1f} vectors of the parameters. Goal: at most {VECTORS}.",
    ]
    (asked.out / "point.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
