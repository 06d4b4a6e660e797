"""On a GPU: how much of bare compiled forward passes is left, and what does F cost on 8,000 images?

    python benchmarks/gpu.py --data-dir /data                 # PACS; one NVIDIA GPU; not yet run to its end
    python benchmarks/gpu.py --data-dir /data --device cpu --image-size 32 --images 130 --radii 2 --rel-error 0.5

Each network is trained here, with bf16, on images of all four domains of PACS. Bare: the model compiled by
torch.compile, without gradients, in float32, at the batch size at which it is fastest. Ours: `sphere_flatness` on the
eager model and on the compiled one, pilot included; the first network's compiled call runs until it is accurate, the
others for their speed alone. Plain (SWAD's procedure) needs (spread / mean / error)^2 passes at each radius, estimated
from a few directions; its seconds are those of as many bare passes. Training with and without data:
`benchmarks/training.py --device cuda --precision bf16`.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from plain import Plain
from torch import Tensor, nn

from flatlab import Landscape, environment, radii_at_rises, sphere_flatness
from flatlab.data import load as data_load
from flatlab.models.networks import build_network
from flatlab.tensors.precision import float32_in_full

HERE = Path(__file__).parent
SIZES = (64, 256, 1024)
RISES = tuple(np.geomspace(0.01, 2.0, 13).tolist())
GOAL = 0.70
SHORT = 100_000  # images of a call that is measured for its speed alone
FEW = 512  # images of the plain directions
Pair = tuple[Tensor, Tensor]


def clock(device: torch.device) -> float:
    """Return the time when the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def pacs(args: argparse.Namespace) -> Pair:
    """Return images, normalised, channels last, and labels, on the device."""
    data = data_load.load("PACS", data_dir=args.data_dir, image_size=args.image_size, cache=args.cache)
    order = torch.randperm(sum(len(each.labels) for each in data.domains), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([each.labels for each in data.domains])[order[: args.images]]
    images = torch.cat([torch.as_tensor(each.images[:]) for each in data.domains])[order[: args.images]]
    parts = [data.normalise(part.to(args.device)) for part in images.split(512)]
    return torch.cat(parts).contiguous(memory_format=torch.channels_last), labels.to(args.device)


def trained(name: str, data: Pair, args: argparse.Namespace) -> nn.Module:
    """Return a network after some steps of Adam in bf16."""
    model = build_network(name, num_classes=7).to(args.device).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-4, fused=True)
    draws = torch.Generator().manual_seed(1)
    for _ in range(args.steps):
        rows = torch.randint(len(data[1]), (96,), generator=draws).to(args.device)
        optimizer.zero_grad()
        with torch.autocast(args.device.type, torch.bfloat16):
            logits = model(data[0][rows])
        F.cross_entropy(logits.float(), data[1][rows]).backward()
        optimizer.step()
    return model.eval()


def per_second(model: Callable[[Tensor], Tensor], inputs: Tensor, size: int, device: torch.device) -> float:
    """Return the images forwarded a second in batches of a size; the median of three."""
    batches = [batch for batch in inputs.split(size) if len(batch) == size] or [inputs]
    found = []
    with torch.no_grad(), float32_in_full():
        for turn in range(4):
            start = clock(device)
            for batch in batches:
                model(batch)
            found.append(sum(map(len, batches)) / (clock(device) - start))
            if turn == 0:
                found.clear()  # kernels are chosen, or compiled, in the first
    return statistics.median(found)


def ours(
    model: nn.Module, data: Pair, radii: np.ndarray, args: argparse.Namespace, budget: int | None
) -> dict[str, Any]:
    """Return what the default call costs, from the model to the numbers."""
    start = clock(args.device)
    landscape = Landscape(model, [data], F.cross_entropy, batch_size=SIZES[1])
    opened = clock(args.device)
    found = sphere_flatness(landscape, radii, rel_error=args.rel_error, budget=budget)
    end = clock(args.device)
    return {
        "seconds": end - start,
        "opening": opened - start,
        "images": found.cost.images,
        "per_second": found.cost.images / (end - opened),
        "F": found.value.tolist(),
        "stderr": found.stderr.tolist(),
        "stopped": list(found.stopped),
        "blocks": [plan.block_size for plan in found.plans],
    }


def measure(name: str, data: Pair, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what is known of one network, after each call, so that it is kept where the next one is cut off."""
    model = trained(name, data, args)
    found: dict[str, Any] = {"network": name, "images": len(data[1]), "image_size": args.image_size}
    few = data[0][: 2 * SIZES[-1]]
    compiled = torch.compile(copy.deepcopy(model))
    found["bare"] = {size: per_second(compiled, few, size, args.device) for size in SIZES if size <= len(few)}
    found["bare eager"] = {size: per_second(model, few, size, args.device) for size in found["bare"]}
    start = Landscape(model, [(data[0][:1024], data[1][:1024])], F.cross_entropy)
    found["base_loss"] = float(start.base_loss[0])
    radii = radii_at_rises(start, RISES[:: max(1, len(RISES) // args.radii)]).radii
    found["radii"] = radii.tolist()
    with float32_in_full():
        plain = Plain(model, {"all": (data[0][:FEW], data[1][:FEW])})
        rises = np.array([plain.direction(seed, radii) for seed in range(args.directions)])
    found["plain directions"] = ((rises.std(axis=0, ddof=1) / rises.mean(axis=0) / args.rel_error) ** 2).tolist()
    found["plain seconds"] = sum(found["plain directions"]) * len(data[1]) / max(found["bare"].values())
    # Blocks, pilot and checks have batches of many sizes, of which each would be compiled anew.
    sizes = torch.compile(copy.deepcopy(model), dynamic=True)
    for how, each in (("eager", model), ("compiled", sizes)):
        whole = how == "compiled" and name == args.networks.partition(",")[0]
        found[how] = ours(each, data, radii, args, None if whole else SHORT)
        yield found


def page(found: dict[str, Any]) -> str:
    """Return the tables."""
    first, error = found["rows"][0], found["rel_error"]
    lines = [
        "# On a GPU\n",
        f"{found['card']}, torch {found['machine']['torch']}, float32 (no TF32), {first['images']:,} images of PACS at",
        f"{first['image_size']} pixels, {len(first['radii'])} radii, F to {error:.0%}. Share: images a second in",
        "the default `sphere_flatness`, the pilot included, over those of bare compiled forward passes at their best",
        f"batch size; the goal is {GOAL:.0%}. Seconds are those of the whole call where it ended by itself.",
        f"Plain: passes needed, by the spread of {found['directions']} directions on {FEW} images, at the speed of the",
        "bare ones; not run to its end.\n",
        "| network | bare, images/s | ours on | images/s | share | images | seconds | plain, seconds | plain / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        best = max(row["bare"].values())
        for how in [each for each in ("eager", "compiled") if each in row]:
            own = row[how]
            ended = set(own["stopped"]) == {"accuracy"}
            cells = (
                row["network"],
                f"{best:,.0f}",
                f"the {how} model",
                f"{own['per_second']:,.0f}",
                f"{own['per_second'] / best:.0%}",
                f"{own['images']:,.0f}",
                f"{own['seconds']:.0f}" if ended else "",
                f"{row['plain seconds']:,.0f}" if ended else "",
                f"{row['plain seconds'] / own['seconds']:.0f}" if ended else "",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--networks", default="resnet50,mobilenet_v2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--radii", type=int, default=13)
    parser.add_argument("--rel-error", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--directions", type=int, default=12, help="of the plain procedure, to estimate its spread")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    card = torch.cuda.get_device_name() if args.device.type == "cuda" else "the CPU"
    data = pacs(args)
    found: dict[str, Any] = {
        "card": card,
        "machine": environment.facts(),
        "directions": args.directions,
        "rel_error": args.rel_error,
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(args.networks.split(",")):
        for row in measure(name, data, args):
            found["rows"][number:] = [row]
            (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
            (args.out / "gpu.md").write_text(page(found))
            print(page(found), flush=True)


if __name__ == "__main__":
    main()
