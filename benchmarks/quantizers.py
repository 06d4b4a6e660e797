"""What LSQ training costs over full precision: ours, lsq-net's plain formulation, torch's fused op, and brevitas.

    python benchmarks/quantizers.py --out benchmarks/results   # MobileNetV2, 96 images of 64 and of 224 pixels
    python benchmarks/quantizers.py --image-size 64 --rounds 3 # sooner

One step is forward, backward and Adam, with frozen BatchNorm statistics, on one constant batch, with the allocator's
setting that flatlab gives its workers. Each round steps all variants, each time another one first, so that a machine
that others use as well slows all of them alike; a ratio is the median over rounds of the ratio within a round, its
interval a bootstrap over rounds. With --out each round is kept as it ends, and the same command goes on from there.
All start from the same weights. lsq-net's plain formulation is written anew here from the LSQ
paper (arXiv 1902.08153): detach tricks, the layer's forward computes its quantized weight. `native` is torch's fused
op, which counts what lies up to half a step beyond the outer levels as inside: what fusing could save, not LSQ.
brevitas is left out where it is not installed.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab import environment
from flatlab.jobs.local import ALLOCATOR
from flatlab.models.networks import build_network, set_training
from flatlab.quant.attach import attach, clamp_scales, layers
from flatlab.quant.codebook import initial_scale, levels

GOAL = 1.15  # times the full-precision step
PLAIN, OURS = "full precision", "flatlab"
BOOTSTRAPS = 2000
Taken = dict[str, list[float]]  # variant -> seconds of a step, in each round


class Detached(nn.Module):
    """A convolution that quantizes its weight by detach tricks, as lsq-net's modules do."""

    def __init__(self, layer: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.layer = layer
        self.low, self.high = levels(bits)
        self.scale = nn.Parameter(initial_scale(layer.weight, self.high))

    def forward(self, inputs: Tensor) -> Tensor:
        weight, step = self.layer.weight, self.scale
        factor = 1 / math.sqrt(weight.numel() * self.high)
        step = (step - step * factor).detach() + step * factor
        clipped = torch.clamp(weight / step, self.low, self.high)
        rounded = (clipped.round() - clipped).detach() + clipped
        return self.layer._conv_forward(inputs, rounded * step, self.layer.bias)


class Native(nn.Module):
    """The same by torch's fused op."""

    def __init__(self, layer: nn.Conv2d, bits: int) -> None:
        super().__init__()
        self.layer = layer
        self.low, self.high = levels(bits)
        self.scale = nn.Parameter(initial_scale(layer.weight, self.high).flatten())
        self.register_buffer("zero", torch.zeros_like(self.scale))
        self.factor = 1 / math.sqrt(layer.weight[0].numel() * self.high)

    def forward(self, inputs: Tensor) -> Tensor:
        weight = torch._fake_quantize_learnable_per_channel_affine(
            self.layer.weight, self.scale, self.zero, 0, self.low, self.high, self.factor
        )
        return self.layer._conv_forward(inputs, weight, self.layer.bias)


def replaced(network: nn.Module, make: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
    for name, layer in layers(network).items():
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, make(layer))
    return network


def brevitas(network: nn.Module, bits: int) -> nn.Module:
    """Learned step sizes of each channel, trained from the weights' own statistics."""
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantConv2d
    from brevitas.quant import Int8WeightPerChannelFloat

    class Learned(Int8WeightPerChannelFloat):
        scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS
        bit_width = bits

    def make(layer: nn.Conv2d) -> nn.Module:
        fields = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options = {field: getattr(layer, field) for field in fields}
        quantized = QuantConv2d(**options, bias=layer.bias is not None, weight_quant=Learned)
        quantized.weight.data.copy_(layer.weight)
        return quantized.to(layer.weight.device)

    return replaced(network, make)


def ours(network: nn.Module, bits: int) -> nn.Module:
    attach(network, bits=bits)
    return network


VARIANTS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    PLAIN: lambda network, bits: network,
    OURS: ours,
    "lsq-net's plain formulation": lambda network, bits: replaced(network, lambda layer: Detached(layer, bits)),
    "native": lambda network, bits: replaced(network, lambda layer: Native(layer, bits)),
    "brevitas": brevitas,
}


def stepper(network: nn.Module, batch: tuple[Tensor, Tensor], *, clamped: bool, precision: str) -> Callable[[], None]:
    inputs, targets = batch
    network = network.to(memory_format=torch.channels_last)
    set_training(network, freeze_batchnorm=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(network(inputs), targets)
        loss.backward()
        optimizer.step()
        if clamped:  # as the training loop does
            clamp_scales(network)

    return step


def seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - started) / steps


def steppers(args: argparse.Namespace, image_size: int) -> dict[str, Callable[[], None]]:
    device, draws = torch.device(args.device), torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, image_size, image_size, generator=draws)
    targets = torch.randint(7, (args.batch_size,), generator=draws)
    batch = images.to(device, memory_format=torch.channels_last), targets.to(device)
    network = build_network(args.model, num_classes=7).to(device)
    found = {}
    for name, quantize in VARIANTS.items():
        if name == "brevitas" and not importlib.util.find_spec("brevitas"):
            print("brevitas is not installed: left out (pip install brevitas).", file=sys.stderr)
            continue
        own = quantize(copy.deepcopy(network), args.bits)
        found[name] = stepper(own, batch, clamped=name == OURS, precision=args.precision)
    return found


def measure(args: argparse.Namespace, image_size: int, taken: Taken, keep: Callable[[], None]) -> None:
    """Add rounds to what was taken, until there are enough.

    Args:
        args: the command's.
        image_size: in pixels.
        taken: of earlier rounds, added to.
        keep: called after each round.
    """
    done = len(taken.get(PLAIN, []))
    if done >= args.rounds:
        return
    steps = steppers(args, image_size)
    for step in steps.values():  # warm up: kernels, Adam's moments
        seconds(step, 2, torch.device(args.device))
    names = list(steps)
    for turn in range(done, args.rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]  # nobody is always first
        times = {name: seconds(steps[name], args.steps, torch.device(args.device)) for name in order}
        for name in names:
            taken.setdefault(name, []).append(times[name])
        keep()
        said = ", ".join(f"{name} {times[name] / times[PLAIN]:.3f}" for name in names[1:])
        print(f"{image_size} pixels, round {turn + 1} of {args.rounds}: {said}", file=sys.stderr, flush=True)


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Return the median over rounds of the ratio, and its 95 % bootstrap interval."""
    each = np.array(above) / np.array(below)
    draws = np.random.default_rng(0).integers(len(each), size=(BOOTSTRAPS, len(each)))
    low, high = np.quantile(np.median(each[draws], axis=1), [0.025, 0.975])
    return {"ratio": float(np.median(each)), "low": float(low), "high": float(high)}


def summary(taken: Taken) -> list[dict[str, Any]]:
    return [
        {
            "variant": name,
            "seconds": float(np.median(own)),
            **ratio(own, taken[PLAIN]),
            "ours_over_it": ratio(taken[OURS], own),
            "rounds": len(own),
        }
        for name, own in taken.items()
    ]


def section(args: argparse.Namespace, image_size: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"## {args.model}, {args.batch_size} images of {image_size} x {image_size}, {rows[0]['rounds']} rounds\n",
        "| a step of | seconds | times full precision | ours, times it |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{each['ratio']:.3f} [{each['low']:.3f}, {each['high']:.3f}]" for each in (row, row["ours_over_it"])]
        lines.append(f"| {row['variant']} | {row['seconds']:.3f} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--image-size", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--bits", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--steps", type=int, default=1, help="in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder of quantizers.json and quantizers.md (none: print alone)")
    return parser.parse_args()


def words(args: argparse.Namespace) -> str:
    return (
        f"# What LSQ training costs over full precision\n\n{args.bits} bits, {args.device}, {args.precision}, "
        f"{args.threads} threads, torch {torch.__version__}; goal: at most {GOAL} times full precision, and ahead of\n"
        "lsq-net's formulation and of brevitas. Medians over rounds, 95 % bootstrap intervals over rounds.\n"
    )


def main() -> None:
    if not set(ALLOCATOR.items()) <= set(os.environ.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    args = parsed()
    torch.set_num_threads(args.threads)
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "rounds", "image_size")}
    facts = {"asked": asked, "allocator": ALLOCATOR, "machine": environment.facts(), "goal": GOAL}
    path = args.out / "quantizers.json" if args.out else None
    kept = json.loads(path.read_text()) if path and path.exists() else {}
    rounds: dict[str, Taken] = kept["rounds"] if kept.get("facts", {}).get("asked") == asked else {}

    def keep() -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = {size: summary(taken) for size, taken in rounds.items() if taken}
            part = path.with_suffix(".part")
            part.write_text(json.dumps({"facts": facts, "rows": rows, "rounds": rounds}, indent=1) + "\n")
            part.rename(path)

    for size in args.image_size:
        measure(args, size, rounds.setdefault(str(size), {}), keep)
    parts = [line for size, taken in rounds.items() for line in section(args, size, summary(taken))]
    text = "\n".join([words(args), *parts])
    print(text)
    if path:
        path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
