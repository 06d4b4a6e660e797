"""Calls of the command line inside the test's own process, and a small tree of pictures to train on."""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flatlab import cli
from flatlab.jobs import local
from flatlab.jobs.worker import work
from flatlab.store.runs import RunStore

TINY = ("--setting", "smoke", "--held-out", "rot0", "--seeds", "1")
PETS = ("--setting", "smoke", "--model", "digits-cnn", "--image-size", "16", "--held-out", "sketch", "--seeds", "1")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@contextmanager
def workers_here():
    """Do the workers' jobs in this process: starting one takes two seconds."""

    def run(plan, *, workers, on_event):
        heard = []

        def emit(event):
            on_event(event)
            heard.append(event)

        work(plan.jobs, RunStore(plan.store), plan.place, emit=emit)
        return [event for event in heard if "error" in event]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "run_locally", run)
        yield


def call(*words: object) -> int:
    """Return the exit code of a command."""
    with workers_here(), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return end.value.code


DOCUMENTED = {
    command: set(re.findall("`(.+?)`", keys))
    for commands, keys in re.findall(
        r"^\| (`.*) \| (?:rows|facts).* \| (`.*) \|$",
        (Path(__file__).parents[1] / "docs" / "commandline.md").read_text(),
        re.MULTILINE,
    )
    for command in re.findall("`(.+?)`", commands)
}


def documented(command: str, out: str):
    """Return the answer that a command printed with --json, whose keys are those that its documentation names."""
    answer = json.loads(out)
    for each in answer if isinstance(answer, list) else [answer]:
        assert DOCUMENTED[command] <= each.keys(), f"{command}: {sorted(DOCUMENTED[command] - each.keys())} missing"
    return answer


def pets(root: Path, *, skip: tuple[str, str] | None = None, domains=("paint", "photo", "sketch")) -> Path:
    """Write ten pictures of each of two classes in some domains, but one class of one domain where that is wished."""
    draw = np.random.default_rng(0)
    for domain, suffix in zip(domains, ("png", "jpg", "webp"), strict=False):
        for place, kind in enumerate(("cat", "dog")):
            folder = root / domain / kind
            folder.mkdir(parents=True)
            for i in range(0 if skip == (domain, kind) else 10):
                pixels = draw.integers(0, 120, (20, 24, 3)) + 100 * place
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{suffix}")
    return root


def only_run(store: Path) -> str:
    """Return the digest of a store's one run."""
    (run,) = RunStore(store).runs()
    return run.spec.digest
