"""What does the default `sphere_flatness` cost over the forward passes that it reports?

    python benchmarks/overhead.py [--only mlp-1e5] [--rounds 3] [--largest 1e5]

Processor time of one thread for opening a landscape and measuring six automatic radii, over (images forwarded x the
time of an image in a bare forward pass with the loss, at its best batch size), in turns in one process for each cell.
Images are counted in the model itself, those of opening and pilot with the others; one forwarded for a gradient counts
as three. The plan takes larger blocks where drawing a direction costs more than forwarding images, so that the ratio is
what an image costs, not how long users wait. Cells are kept in `--work` and not measured again. The encoder of MiniLM's
size has random weights, and a budget of 30,000 images: what the default asks for would take hours.

The last column is the time of the crossed design, each direction on all images, for the same standard errors, over that
of the default: (spread / error)^2 directions at each radius, the spread from some of them, which are timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flatness import pinned
from torch import Tensor, nn

import flatlab
from flatlab import environment
from flatlab.models.networks import build_network

HERE = Path(__file__).parent
GOAL = 1.25
SIZES = (32, 64, 128, 256, 512, 1024, 4096)
LIVE = {"encoder-2e7": 500}  # images of a timed bare pass, at least
BACKWARD = 2  # forward equivalents of a backward pass
BUDGET = {"encoder-2e7": 30_000}
CROSSED = 4_000_000  # images of the directions of the crossed design, which are between 4 and 32
MLPS = {"mlp-1e3": (20, 32), "mlp-1e5": (64, 256, 256, 64)}  # widths: 1,002 and 99,530 parameters
SAMPLES = {"mlp-1e3": (10**3, 10**4, 10**5, 10**6), "mlp-1e5": (10**3, 10**4, 10**5, 10**6)}
SAMPLES |= {"mobilenet": (10**3, 10**4), "encoder-2e7": (10**3, 10**4)}
Pair = tuple[Tensor, Tensor]


class Encoder(nn.Module):
    """A transformer encoder of MiniLM's size: 6 layers of width 384, 30,522 word pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30_522, 384)
        layer = nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 2)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (N, 2) of word pieces (N, T)."""
        return self.head(self.layers(self.words(words)).mean(1))


def subject(name: str, count: int) -> tuple[nn.Module, Pair]:
    """Return a network and as many samples."""
    torch.manual_seed(0)
    if name in MLPS:
        widths = (*MLPS[name], 10)
        layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        inputs = torch.randn(count, widths[0])
        return fitted(nn.Sequential(*layers[:-1]), (inputs, inputs[:, :10].argmax(1)), 200)
    if name == "mobilenet":
        model: nn.Module = build_network("mobilenet_v2", in_channels=3, num_classes=7)
        return model.eval(), (torch.randn(count, 3, 64, 64), torch.randint(7, (count,)))
    words = torch.randint(30_522, (count, 32))
    return Encoder().eval(), (words, words[:, 0] % 2)


def fitted(model: nn.Module, data: Pair, steps: int) -> tuple[nn.Module, Pair]:
    """Return a network after some steps of Adam, so that it lies near a minimum."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        inputs, targets = (each.roll(-256 * step, 0)[:256] for each in data)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval(), data


def per_image(model: nn.Module, data: Pair, size: int, live: int) -> float:
    """Return the processor time of an image in a bare forward pass with the loss."""
    inputs, targets = data
    count, started = 0, time.process_time()
    with torch.inference_mode():
        while count < min(live, 4 * len(targets)):
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                F.cross_entropy(model(x), y)
                count += len(y)
                if count >= live:
                    break
    return (time.process_time() - started) / count


def measured(model: nn.Module, data: Pair, budget: int | None) -> dict[str, float]:
    """Return the processor time of opening and of measuring, and the images forwarded by each."""
    batches, images = list(zip(*(each.split(256) for each in data), strict=True)), 0

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal images
        images += len(inputs[0]) * (1 + BACKWARD * torch.is_grad_enabled())

    with model.register_forward_pre_hook(count):
        started = time.process_time()
        landscape = flatlab.Landscape(model, batches, F.cross_entropy)
        opened, of_opening = time.process_time(), images
        found = flatlab.sphere_flatness(landscape, "auto", budget=budget)
        ended = time.process_time()
    crossed = None if budget else crossed_design(landscape, found)
    return {
        "crossed": crossed,
        "opening": opened - started,
        "measuring": ended - opened,
        "images": images,
        "of_opening": of_opening,
        "reported": found.cost.images,
    }


def crossed_design(landscape: flatlab.Landscape, found: flatlab.SphereFlatness) -> float:
    """Return the processor time that the crossed design would take for the same standard errors."""
    count = max(4, min(32, CROSSED // (landscape.num_samples * len(found.radii))))
    started = time.process_time()
    made = flatlab.sphere_flatness(landscape, found.radii, num_samples=count, seed=1)
    each = (time.process_time() - started) / count / len(found.radii)
    return float((count * np.square(made.stderr / found.stderr)).sum() * each)


def cell(name: str, count: int, rounds: int) -> dict[str, Any]:
    """Return the numbers of a cell; the first measurement, which imports what it needs, does not count."""
    model, data = subject(name, count)
    few = tuple(each[:512] for each in data)
    flatlab.sphere_flatness(flatlab.Landscape(model, [few], F.cross_entropy), [1e-3], num_samples=2)
    sizes = [size for size in SIZES if size <= count]
    live = LIVE.get(name, 20_000)
    best = min(sizes, key=lambda size: per_image(model, few if name not in MLPS else data, size, live))
    bare, turns = partial(per_image, model, data, best, live), []
    for _ in range(rounds):
        before, turn, after = bare(), measured(model, data, BUDGET.get(name)), bare()
        alone = (before + after) / 2 * turn["images"]
        turns.append({**turn, "ratio": (turn["opening"] + turn["measuring"]) / alone})
    ratios = sorted(turn["ratio"] for turn in turns)
    parameters = sum(each.numel() for each in model.parameters())
    return {
        "network": name,
        "parameters": parameters,
        "samples": count,
        "batch": best,
        **{each: turns[0][each] for each in ("images", "of_opening", "reported")},
        "seconds": statistics.median(turn["opening"] + turn["measuring"] for turn in turns),
        "crossed": statistics.median(turn["crossed"] / turn["measuring"] for turn in turns)
        if turns[0]["crossed"]
        else None,
        "rounds": rounds,
        "ratio": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
    }


def write(rows: list[dict[str, Any]], out: Path) -> str:
    """Write overhead.md and overhead.json; returns the text."""
    lines = [
        "# What an image costs in the default `sphere_flatness`",
        "",
        "Processor time of one thread, opening and pilot included, over that of as many images in bare forward passes",
        "at the best batch size; an image of which a gradient was computed counts as three. Medians over rounds, with",
        f"least and largest. Goal: at most {GOAL}.",
        "",
        "| network | parameters | samples | images forwarded | of opening | rounds | ratio | | crossed, time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["range"]
        lines.append(
            f"| {row['network']} | {row['parameters']:,} | {row['samples']:,} | {row['images']:,} "
            f"| {row['of_opening']:,} | {row['rounds']} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {'holds' if row['ratio'] <= GOAL else '**missed**'} "
            f"| {'' if row['crossed'] is None else format(row['crossed'], '.3g')} |"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "overhead.json").write_text(
        json.dumps({"machine": environment.facts(), "goal": GOAL, "rows": rows}, indent=1) + "\n"
    )
    (out / "overhead.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the name of a network")
    parser.add_argument("--largest", type=float, default=1e6, help="largest number of samples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=HERE / ".work" / "overhead")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    pinned()
    torch.set_num_threads(1)
    if asked.cell:
        print(json.dumps(cell(asked.cell[0], int(asked.cell[1]), asked.rounds)))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, counts in SAMPLES.items():
        for count in counts:
            kept = asked.work / f"{name}-{count}.json"
            if not kept.exists() and asked.only in name and count <= asked.largest:
                command = [sys.executable, __file__, "--rounds", str(asked.rounds), "--cell", name, str(count)]
                kept.write_text(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            if kept.exists():
                rows.append(json.loads(kept.read_text()))
    print(write(rows, asked.out))


if __name__ == "__main__":
    main()
