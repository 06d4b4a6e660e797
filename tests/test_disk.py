"""Disks whose locks end at the node are refused; pauses between looks at a disk grow."""

from itertools import islice

import pytest

from flatlab import files
from flatlab.errors import UserError
from flatlab.store import disk

LINE = "31 1 0:27 / {point} rw,relatime shared:1 - {kind} server:/x rw,{options}\n"


def _mounted(tmp_path, monkeypatch, kind, options, point=None):
    table = tmp_path / "mountinfo"
    here = str(point or tmp_path / "data disk").replace(" ", "\\040")
    table.write_text(
        LINE.format(point="/", kind="ext4", options="x")
        + LINE.format(point=here, kind=kind, options=options)
        + LINE.format(point=f"{here}-other", kind="gpfs", options="x")
    )
    monkeypatch.setattr(disk, "MOUNTS", table)
    return tmp_path / "data disk" / "runs"


@pytest.mark.parametrize(
    "kind, options, shown",
    [
        ("nfs", "vers=3,nolock,local_lock=none", "got nfs with nolock: mount it without nolock and local_lock, or"),
        ("nfs4", "vers=4.2,local_lock=flock", "got nfs4 with local_lock=flock: "),
        ("lustre", "localflock,lazystatfs", "got lustre with localflock: mount it with the option flock, or"),
        ("gpfs", "mtime", "got gpfs: take a folder on NFS"),
    ],
)
def test_a_disk_whose_locks_end_at_the_node_is_refused(tmp_path, monkeypatch, kind, options, shown):
    store = _mounted(tmp_path, monkeypatch, kind, options)
    with pytest.raises(UserError) as caught:
        disk.require_shared_locks(store)
    assert f"{store} must be on a disk whose locks all nodes see, {shown}" in str(caught.value)
    disk.require_shared_locks(tmp_path / "elsewhere")  # on the disk of /


@pytest.mark.parametrize(
    "kind, options",
    [("nfs4", "vers=4.2,local_lock=none"), ("lustre", "flock"), ("ext4", "nolock"), ("ceph", "acl")],
)
def test_other_disks_are_accepted(tmp_path, monkeypatch, kind, options):
    disk.require_shared_locks(_mounted(tmp_path, monkeypatch, kind, options))


def test_a_later_mount_hides_an_earlier_one(tmp_path, monkeypatch):
    _mounted(tmp_path, monkeypatch, "gpfs", "x", point="/")
    with pytest.raises(UserError, match="gpfs"):
        disk.require_shared_locks(tmp_path / "x")


def test_this_disk_is_accepted(tmp_path):
    disk.require_shared_locks(tmp_path)


def test_pauses_grow_to_seconds():
    assert list(islice(files.pauses(0.1), 7)) == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
