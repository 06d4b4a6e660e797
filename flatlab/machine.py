"""Facts about the machine and the software, for provenance: never part of a digest."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import flatlab


def facts() -> dict[str, str]:
    """Return versions, processor, and the commit of the source tree where there is one."""
    packages = {name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")}
    return {
        "flatlab": flatlab.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        **packages,
    }


def commit() -> str:
    """Return the commit of flatlab's own source tree, or "unknown" for an installed package."""
    tree = Path(flatlab.__file__).parents[1]
    if not (tree / ".git").exists():
        return "unknown"
    try:
        told = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = subprocess.run(["git", "-C", str(tree), "status", "--porcelain"], capture_output=True, text=True)
    return told.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
