"""The file system of a store: whether its locks hold on all nodes."""

import re
from pathlib import Path

from flatlab.errors import UserError

MOUNTS = Path("/proc/self/mountinfo")  # of Linux; on other systems the locks count as shared
NODE_LOCAL = (  # file system, mount option (an empty pattern: any), and the remedy
    (r"nfs4?", r"nolock|local_lock=(all|flock)", "mount it without nolock and local_lock"),
    (r"lustre", r"localflock|noflock", "mount it with the option flock"),
    (r"gpfs|fuse\.sshfs", r"", "take a folder on NFS, Lustre with flock, CephFS or BeeGFS"),
)


def require_shared_locks(root: Path) -> None:
    """Refuse a store whose file system keeps `flock` within a node: two nodes would hold one lock.

    Raises:
        UserError: states the file system, its option and the remedy.
    """
    if not MOUNTS.exists():
        return
    kind, options = _mount(root.resolve(), MOUNTS.read_text())
    for kinds, pattern, remedy in NODE_LOCAL:
        found = next((each for each in options if re.fullmatch(pattern, each)), "")
        if re.fullmatch(kinds, kind) and (found or not pattern):
            raise UserError(
                f"The store {root} must be on a disk whose locks all nodes see, got {kind}"
                f"{f' with {found}' if found else ''}: {remedy}, or name another --store."
            )


def _mount(path: Path, table: str) -> tuple[str, list[str]]:
    """Return the file system of a path and its options; the last mount at a folder hides earlier ones."""
    best: tuple[int, str, list[str]] = (-1, "", [])
    for line in table.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, own = right.split(" ", 2)
        point = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), left.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), kind, [*left.split()[5].split(","), *own.split(",")])
    return best[1], best[2]
