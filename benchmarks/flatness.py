"""What flatness costs: SWAD's procedure, plainly, against ours, side by side in one run on real networks and images.

    python benchmarks/flatness.py [--quick] [--only digits] [--shared FOLDER]

Counts of forwarded images rest on no clock; seconds are medians of interleaved runs and are told as ratios. What is
done is kept under --work, and not done again.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import subjects
import torch
import torch.nn.functional as F
from plain import Plain
from report import write

from flatlab import Landscape, environment, sphere_flatness
from flatlab.jobs.local import ALLOCATOR
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.results.sphere import SamplingPlan

HERE = Path(__file__).parent
RISES = (0.01, 0.1, 0.5, 2.0)  # nats
REL_ERROR = 0.02
PROBES = 16  # directions of the bisection for the radii


@dataclass
class Arena:
    """One network on one set of images, measured by both sides in turns."""

    subject: subjects.Subject
    count: int | None  # images, about; None: all
    work: Path
    like: "Arena | None" = None  # whose radii are taken
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.subject.name}-{self.count or 'all'}"

    @cached_property
    def plain(self) -> Plain:
        return Plain(*self.subject.load(self.count))

    @cached_property
    def landscape(self) -> Landscape:
        """The engine's own view of the same images, on a model of its own."""
        model, strata = self.subject.load(self.count)
        batches = {name: list(zip(*(t.split(64) for t in pair), strict=True)) for name, pair in strata.items()}
        return Landscape(model, batches, F.cross_entropy, batch_size=self.plain.batch_size)

    def keep(self, name: str, make: Callable[[], object]) -> object:
        """Return what was kept under this name; makes it where it is missing."""
        path = self.work / self.name / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(make()))
            part.rename(path)
        return json.loads(path.read_text())

    @property
    def radii(self) -> np.ndarray:
        if self.like is not None:
            return self.like.radii
        return np.array(self.keep("radii", self._radii))

    def _radii(self) -> list[float]:
        """Find the radii by bisection on common rays; they differ from those of either side."""
        inputs = {name: (x[:32], y[:32]) for name, (x, y) in self.plain.strata.items()}
        small = Plain(self.plain.model, inputs)
        found = []
        for rise in RISES:
            low, high = 1e-3, 1e2
            for _ in range(12):
                middle = float(np.sqrt(low * high))
                mean = np.mean([small.direction(-1 - k, np.array([middle]))[0] for k in range(PROBES)])
                low, high = (middle, high) if mean < rise else (low, middle)
            found.append(round(low, 4))
        return found

    def plain_direction(self, seed: int) -> dict[str, object]:
        """Walk one direction plainly, by the clock."""
        start = time.perf_counter()
        rises = self.plain.direction(seed, self.radii).tolist()
        middle = time.perf_counter()
        return {"rises": rises, "seconds_per_pass": (middle - start) / len(rises)}

    def ours(self, seed: int) -> dict[str, object]:
        """Measure to the accuracy that is asked for, and note what it cost."""
        start = time.perf_counter()
        flatness = sphere_flatness(self.landscape, self.radii, rel_error=REL_ERROR, seed=seed)
        seconds = time.perf_counter() - start
        walked = [
            len(visits) * self.landscape.num_samples / blocks * (2 if plan.paired else 1)
            for visits, blocks, plan in zip(flatness.visits, flatness.blocks, flatness.plans, strict=True)
        ]
        return {
            "value": flatness.value.tolist(),
            "stderr": flatness.stderr.tolist(),
            "images": flatness.cost.images,
            "walked": walked,  # at each radius; the rest is the pilot and the losses at w
            "plans": [
                [plan.block_size, plan.paired, len(v)] for plan, v in zip(flatness.plans, flatness.visits, strict=True)
            ],
            "stopped": list(flatness.stopped),
            "seconds": seconds,
        }

    def crossed(self, turn: int) -> dict[str, float]:
        """Clock points of the crossed design against bare forward passes at the same batch size."""
        points, _ = 2 * len(self.radii), self.landscape.base_loss  # known before the clock starts
        begin = time.perf_counter()
        for _ in range(points):
            self.plain.forward()
        middle = time.perf_counter()
        Sampler([self.landscape], turn, "none").evaluate([SamplingPlan(float(r), 0) for r in self.radii], range(2))
        return {"bare": (middle - begin) / points, "point": (time.perf_counter() - middle) / points}

    def measure(self, *, seeds: int, directions: int, turns: int) -> None:
        """Let the two sides take turns until each has what it needs."""
        per_turn = -(-directions // max(seeds, 1))
        for seed in range(seeds):
            self.keep(f"ours-{seed}", lambda seed=seed: self.ours(seed))
            for k in range(seed * per_turn, min(directions, (seed + 1) * per_turn)):
                self.keep(f"plain-{k}", lambda k=k: self.plain_direction(k))
            print(f"{self.name}: turn {seed + 1} of {seeds}", flush=True)
        for turn in range(turns):
            self.keep(f"crossed-{turn}", lambda turn=turn: self.crossed(turn))
        self.keep(
            "facts",
            lambda: {
                "name": self.name,
                "words": self.subject.words,
                "images": self.landscape.num_samples,
                "params": self.landscape.num_params,
                "base_loss": self.landscape.base_loss.tolist(),
                "slope": float(self.landscape.gradient().norm()),
                "plain_batch_size": self.plain.batch_size,
            },
        )

    def kept(self, kind: str) -> list[dict[str, object]]:
        paths = sorted((self.work / self.name).glob(f"{kind}-*.json"), key=lambda path: int(path.stem.split("-")[1]))
        return [json.loads(path.read_text()) for path in paths]


def arenas(given: argparse.Namespace) -> list[tuple[Arena, dict[str, int]]]:
    """Return what is measured, and how much of it."""
    work = given.work / ("quick" if given.quick else "flatness")
    small = Arena(subjects.digits(given.work), None, work)
    if given.quick:
        return [(small, {"seeds": 2, "directions": 8, "turns": 2})]
    whole = [(small, {"seeds": given.seeds, "directions": 480, "turns": 7})]
    if (large := subjects.mobilenet(given.work, given.shared)) is None:
        print("PACS is not at hand (--shared): only the digits are measured.")
        return whole
    thousand = Arena(large, 1024, work)
    return [
        *whole,
        (thousand, {"seeds": given.seeds, "directions": 192, "turns": 5}),
        (Arena(large, None, work, like=thousand), {"seeds": given.seeds, "directions": given.far, "turns": 0}),
    ]


def pinned() -> None:
    """Start again with the allocator's setting that flatlab gives its workers: the C library reads it but once."""
    if not set(ALLOCATOR.items()) <= set(os.environ.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the name of a network and a number of images")
    parser.add_argument("--shared", type=Path, default=subjects.SHARED, help="folder of PACS and the weights")
    parser.add_argument("--work", type=Path, default=HERE / ".work")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--far", type=int, default=48, help="plain directions on all 8,000 images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the digits, coarsely: a smoke check")
    given = parser.parse_args()
    pinned()
    torch.set_num_threads(given.threads)
    chosen = [(arena, effort) for arena, effort in arenas(given) if given.only in arena.name]
    for arena, effort in chosen:
        arena.measure(**effort)
    out = given.out or (given.work / "quick" if given.quick else HERE / "results")
    facts = {"machine": environment.facts(), "threads": given.threads, "allocator": ALLOCATOR, "rel_error": REL_ERROR}
    print(write([arena for arena, _ in chosen], facts, out))


if __name__ == "__main__":
    main()
