"""Machine and software versions, for provenance: never part of a digest."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import flatlab

# Instruction sets that determine which kernels run, and thus rounding; named as in /proc/cpuinfo.
INSTRUCTIONS = ["avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "avx512_vnni"]
INSTRUCTIONS += ["avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "asimd", "neon", "sve", "sve2", "bf16", "i8mm"]


def facts() -> dict[str, str]:
    """Return versions, processor, and the commit of the source tree if there is one; does not import torch."""
    packages = {name: version(name) for name in ("torch", "numpy", "scipy", "scikit-learn")}
    return {
        "flatlab": flatlab.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.system(),
        **_processor(),
        **packages,
        **_capability(),
    }


def _capability() -> dict[str, str]:
    """Return the instruction set that torch's kernels use, if this process has loaded torch."""
    torch = sys.modules.get("torch")
    return {"cpu_capability": str(torch.backends.cpu.get_cpu_capability())} if torch else {}


@cache
def _processor() -> dict[str, str]:
    """Return the processor's name and those of its instruction sets that affect rounding."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    flags = (first.get("flags") or first.get("Features") or "").split()
    if platform.system() == "Darwin":
        first["model name"] = _output_of("sysctl", "-n", "machdep.cpu.brand_string")
        flags = ["neon"] if platform.machine() == "arm64" else []
    part = f"{platform.machine()} {first.get('CPU implementer', '')} {first.get('CPU part', '')}".strip()  # ARM's
    known = " ".join(name for name in INSTRUCTIONS if name in flags)
    return {"processor": first.get("model name") or part, "instructions": known or "unknown"}


def commit() -> str:
    """Return the commit of flatlab's own source tree, or "unknown" for an installed package.

    "+changes" is appended if a tracked file of the package or of the analyses differs from it.
    """
    tree = Path(flatlab.__file__).parents[1]
    found = _output_of("git", "-C", str(tree), "rev-parse", "HEAD") if (tree / ".git").exists() else ""
    if not found:
        return "unknown"
    changed = ("status", "--porcelain", "--untracked-files=no", "--", "flatlab", "analyses")
    return found + ("+changes" if _output_of("git", "-C", str(tree), *changed) else "")


def code(folder: Path, packages: Iterable[str]) -> str:
    """Return a hash of flatlab's own files, of the modules in a folder, and of the versions of packages."""
    found = hashlib.sha256(" ".join(map(version, packages)).encode())
    for path in (*own_files(), *sorted(path for path in folder.glob("*.py") if path.is_file())):
        found.update(path.read_bytes())
    return found.hexdigest()


def own_files() -> list[Path]:
    """Return flatlab's modules and resources."""
    inside = sorted(Path(flatlab.__file__).parent.rglob("*"))
    return [path for path in inside if path.is_file() and path.parent.name != "__pycache__"]


def _output_of(*command: str) -> str:
    """Return the output of a command; an empty string if it fails or is missing."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def load() -> float | None:
    """Return the system's load average over the last minute; None where the system has none (Windows)."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
