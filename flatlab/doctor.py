"""What this machine computes with, and what would make it faster."""

import os

import torch

from flatlab import build, executors, machine
from flatlab.specs import Place


def diagnose(place: Place) -> list[str]:
    """Return one line for each fact that decides speed or correctness."""
    facts = machine.facts()
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines.append(f"cores: {machine.cores()} (one worker each; torch would use {torch.get_num_threads()} threads)")
    lines.append(f"device: {build.device(place)}" + (f", {torch.cuda.get_device_name()}" if _cuda() else ""))
    unset = [name for name in executors.ALLOCATOR if name not in os.environ]
    if unset:
        words = " ".join(f"{name}={executors.ALLOCATOR[name]}" for name in unset)
        lines.append(
            "allocator: flatlab's workers keep large blocks of memory, which glibc would give back at each free; "
            f"in your own scripts `export {words}` is worth up to 2.6 times for large batches on a CPU."
        )
    return lines


def _cuda() -> bool:
    return bool(torch.cuda.is_available())
