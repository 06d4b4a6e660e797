"""Leftovers of killed processes: partly written files, partly removed runs, folders for a plan.

Only what no process holds is removed. A writer locks its temporary file, and the lock is released when it dies. The
lock may not be visible on other machines: files written on another machine are kept for a day.
"""

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flatlab import files
from flatlab.store.entry import discard
from flatlab.store.runs import RunStore

SECONDS = 2.0  # a file is created before it is locked
DAY = 86400.0


def leftovers(store: RunStore) -> Iterator[Path]:
    """Yield the leftovers of killed processes in a store and in the folder for temporary files."""
    yield from sorted(store.root.glob(".removed-*"))
    for path in sorted(store.root.rglob(".*.tmp")):
        if _abandoned(path):
            yield path
    for folder in sorted(Path(tempfile.gettempdir()).glob(f"{files.SCRATCH}*")):
        if (folder / files.HELD).is_file() and not folder.is_symlink() and _free(folder / files.HELD):
            yield folder


def clean(store: RunStore) -> list[Path]:
    """Remove the leftovers; return them."""
    found = list(leftovers(store))
    for path in found:
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
        else:
            discard(path)
    return found


def _abandoned(path: Path) -> bool:
    """Whether a temporary file is old enough, and no process writes it."""
    if path.is_symlink() or not path.is_file():
        return False
    own = re.search(rf"\.{re.escape(files.HOST)}\.[0-9a-f]{{16}}\.tmp$", path.name)
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # it was renamed: its writer is alive
        return False
    return age > (SECONDS if own else DAY) and files.free(path)


def _free(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return True
    except (Timeout, PermissionError):  # held, or another user's
        return False
