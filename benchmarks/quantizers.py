"""What LSQ training costs over full precision: ours, lsq-net's plain formulation, torch's fused op, and brevitas.

    python benchmarks/quantizers.py                            # MobileNetV2, 96 images of 224 x 224
    python benchmarks/quantizers.py --image-size 64 --rounds 3 # sooner, on a CPU

One step is forward, backward and Adam, with frozen BatchNorm statistics, on one constant batch. Rounds of all variants
alternate, so that a machine that others use as well slows all of them alike; a ratio is the median over rounds of the
ratio within a round. All start from the same weights. lsq-net's plain formulation is written anew here from the LSQ
paper (arXiv 1902.08153): detach tricks, the layer's forward computes its quantized weight. `native` is torch's fused
op, which counts what lies up to half a step beyond the outer levels as inside: what fusing could save, not LSQ.
brevitas is left out where it is not installed.
"""

import argparse
import copy
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlab.models import build_network, set_training
from flatlab.quant.attach import attach, clamp_scales, layers
from flatlab.quant.codebook import initial_scale, levels

GOAL = 1.15  # times the full-precision step


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
    "full precision": lambda network, bits: network,
    "flatlab": ours,
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


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    device, draws = torch.device(args.device), torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=draws)
    targets = torch.randint(7, (args.batch_size,), generator=draws)
    batch = images.to(device, memory_format=torch.channels_last), targets.to(device)
    network = build_network(args.model, num_classes=7).to(device)
    steps = {}
    for name, quantize in VARIANTS.items():
        if name == "brevitas" and not importlib.util.find_spec("brevitas"):
            print("brevitas is not installed: left out (pip install brevitas).", file=sys.stderr)
            continue
        own = quantize(copy.deepcopy(network), args.bits)
        steps[name] = stepper(own, batch, clamped=name == "flatlab", precision=args.precision)
    for step in steps.values():  # warm up: kernels, Adam's moments
        seconds(step, 2, device)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always first
            taken[name].append(seconds(steps[name], args.steps, device))
    return taken


def summary(taken: dict[str, list[float]]) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for name, own in taken.items():
        ratios = [mine / plain for mine, plain in zip(own, taken["full precision"], strict=True)]
        row = {"seconds": statistics.median(own), "ratio": statistics.median(ratios)}
        rows.append({"variant": name, **row, "least": min(ratios), "most": max(ratios)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--bits", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--steps", type=int, default=1, help="in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of quantizers.json and quantizers.md (none: print alone)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = summary(measure(args))
    words = f"{args.model}, {args.batch_size} images of {args.image_size} x {args.image_size}, {args.bits} bits, "
    words += f"{args.device}, {args.precision}; goal: at most {GOAL} times full precision"
    lines = ["# What LSQ training costs over full precision", "", words, "", "| a step of | times | rounds |"]
    lines += ["|---|---|---|"]
    lines += [f"| {r['variant']} | {r['ratio']:.3f} | {r['least']:.3f} to {r['most']:.3f} |" for r in rows]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        facts = {**vars(args), "out": str(args.out), "torch": torch.__version__, "processor": platform.processor()}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "quantizers.json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
        (args.out / "quantizers.md").write_text(text)


if __name__ == "__main__":
    main()
