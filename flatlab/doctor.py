"""What this machine computes with, and what would make it faster."""

import os
from importlib.util import find_spec

import torch

from flatlab import build, executors, machine
from flatlab.specs import Place


def diagnose(place: Place) -> dict[str, str]:
    """Return the facts that decide speed or correctness, by name."""
    named = build.device(place)
    told = {**machine.facts(), "cores": f"{machine.cores()} (one worker each, of one thread)"}
    told["device"] = f"{named}" + (f", {torch.cuda.get_device_name(named)}" if named.type == "cuda" else "")
    told["tensorboard"] = "installed" if find_spec("tensorboard") else "absent; flatlab[tensorboard] brings it"
    unset = [name for name in executors.ALLOCATOR if name not in os.environ]
    if unset:
        words = " ".join(f"{name}={executors.ALLOCATOR[name]}" for name in unset)
        told["allocator"] = (
            "flatlab's workers keep large blocks of memory, which glibc would give back at each free; "
            f"in your own scripts `export {words}` is worth up to 2.6 times for large batches on a CPU."
        )
    return told
