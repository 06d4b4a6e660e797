"""Tiny runs, children that die where they are told to, and what a store holds in bytes."""

import multiprocessing
import os
import shutil
import signal
from multiprocessing import forkserver as server
from pathlib import Path

import pytest

from flatlab.errors import UserError
from flatlab.loading import data as loading_data
from flatlab.metrics.flatness import sampler
from flatlab.specs.measurements import SphereSpec
from flatlab.specs.methods import METHODS, compose, vary
from flatlab.specs.run import Place
from flatlab.specs.settings import SMOKE
from flatlab.store.runs import RunStore
from flatlab.train.loop import train
from flatlab.train.trajectory import Trajectory

PLACE = Place(device="cpu")
LAST, SWITCH = 13, 6  # neither is an evaluation's step
TINY = SMOKE.replace(steps=LAST, eval_every=4, switch=SWITCH, swad_every=2, sma_start=3, swa_every=2)
PROBE = SphereSpec(radii=(0.0, 1.0), num_samples=25, images=8)  # four units, the last one short
SIZES = {"rot0": 450, "rot15": 449, "rot30": 449, "rot45": 449}


def spec(method="ERM", *, seed=0, **parts):
    fields = {name: parts.pop(name) for name in list(parts) if name not in ("step", "average", "quantizer")}
    composed = compose(vary(METHODS[method], parts), TINY, held_out="rot45", seed=seed, trial_seed=0)
    return composed.replace(**fields)


GROUP = [spec(), spec("SWA"), spec("SWAD"), spec("SMA")]
ERM, QT, OTHER = GROUP[0], spec("QT-DoG"), spec(seed=1)
RUNS = [QT, *GROUP, spec("freeze"), OTHER]  # a plan
PROBES = [(ERM, PROBE), (QT, PROBE), (ERM, PROBE.replace(normalisation="filter"))]


def trained(root, *specs, forks=()):
    """Train in this process; return the store."""
    store = RunStore(root)
    train(specs, store, PLACE, forks=forks)
    return store


def forked(root, wanted):
    """A run that continues its parent from the switch, and has the bytes of the run alone."""
    store = trained(root / "forked", wanted.parent, forks={wanted.switch})
    train([wanted], store, PLACE)
    run = store.run(wanted)
    assert [session["from_step"] for session in run.provenance["sessions"]] == [wanted.switch]
    assert wanted.parent.digest in run.provenance["sessions"][0]["how"]
    assert content(run) == content(trained(root / "alone", wanted).run(wanted))
    return run


def copied(store, root):
    shutil.copytree(store.root, root)
    return RunStore(root)


def refuses(act, *words):
    """Assert that something is refused in one line that holds these words."""
    with pytest.raises(UserError) as caught:
        act()
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value)


def content(entry):
    """The bytes of every file that counts."""
    assert entry.done and not entry.faults()
    return {name: (entry.path / name).read_bytes() for name in entry.files()}


def flip(path: Path, bit: int):
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def child(act, *args):
    """Start a process that knows nothing of this one but has torch and the digits at hand."""
    process = multiprocessing.get_context("forkserver").Process(target=act, args=args)
    process.start()
    return process


def run_child(act, *args):
    """Run a child to its end; return its exit code."""
    process = child(act, *args)
    process.join(60)
    return process.exitcode


def forkserver():
    """Start the server of the children, with this module loaded, unless it runs."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    loaded = [
        "stores",
        "flatlab.measure.runner",
        "flatlab.jobs.worker",
        "torch._dynamo",
    ]  # the last: Adam's first act, 1.2 s
    multiprocessing.get_context("forkserver").set_forkserver_preload(loaded)
    server.ensure_running()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


POINTS = {
    "step": (Trajectory, "after"),
    "ray": (sampler, "draw_direction"),
    "sync": (os, "fsync"),
    "rename": (os, "replace"),
}


def watch(tally: Path, point: str | None = None, last: int | None = None):
    """Append a letter to the tally at each step and ray, and die by SIGKILL at the `last` call of a point."""
    for name, (owner, attribute) in POINTS.items():
        setattr(owner, attribute, _watched(getattr(owner, attribute), name, tally, last if name == point else None))


def _watched(act, name, tally, last):
    calls = 0

    def watched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == last:
            if name == "sync":  # half of the file has come to the disk
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if name in ("step", "ray"):
            with open(tally, "ab") as file:
                file.write(name[:1].encode())
        return act(*args, **kwargs)

    return watched


loading_data.domains(spec(), PLACE)  # once, before children are forked
