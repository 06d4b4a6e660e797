"""What does a whole job cost? `flatlab reproduce fig3` over the training steps and forward passes that it contains.

    python benchmarks/job.py [--setting quick] [--rounds 3] [--all]

Processor time of the command and all its processes, cold (empty store) and warm (nothing missing), beside bare torch
loops of the same network in the same run, with the allocator's setting that flatlab gives its workers: as many training
steps (forward, backward, Adam; two of each for SAM), and as many images forwarded, in passes of as many as a block of
the measurements has. The images of pilots, which are not recorded, and what quantization adds count as zero, so that
the ratio is an upper bound.

With --all, also the minutes that `flatlab reproduce all` takes from an empty store, with two workers on this machine;
without, those that were measured before are kept.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from flatness import pinned

from flatlab import environment, reproduce
from flatlab.jobs.local import ALLOCATOR
from flatlab.jobs.plan import BACKWARD
from flatlab.models.networks import build_network
from flatlab.specs.run import Place
from flatlab.specs.settings import SETTINGS, Setting
from flatlab.store.runs import RunStore

HERE = Path(__file__).parent
ROOT = HERE.parent
COLD, WARM, HELP = 1.3, 2.5, 8.0  # goals
ALL = 15  # minutes
USERS = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
ENVIRONMENT = USERS | {"OMP_NUM_THREADS": "1"}


def processor_time(*command: str) -> float:
    """Return the processor time in seconds of a command and its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def minutes_of_all(setting: str) -> float:
    """Return the minutes of `reproduce all` from an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"-m flatlab reproduce all --setting {setting} --workers 2 --store {folder}/runs --out {folder}"
        started = time.monotonic()
        subprocess.run([sys.executable, *command.split()], check=True, capture_output=True, cwd=ROOT, env=USERS)
        return (time.monotonic() - started) / 60


def counted(setting: Setting, store: RunStore) -> dict[str, float]:
    """Return the training steps, and the images forwarded by evaluations and measurements, of a finished store."""
    figure, empty = reproduce.analysis("fig3"), RunStore(store.root / "none")
    steps = images = 0.0
    for job in reproduce.missing(figure, setting, empty, Place(device="cpu")):
        if job.measurements or job.runs[0].members:
            continue
        spec = job.runs[0]
        twice = 1 if spec.step.kind == "plain" else 2
        own = sum(session["to_step"] - session["from_step"] for session in store.run(spec).provenance["sessions"])
        steps += own * twice
        images += job.passes - own * twice * spec.batch_size * 3 * BACKWARD
    images += sum(store.run(run).result(each).cost.images for run, each in figure.plan(setting)[1])
    return {"steps": steps, "images": images}


class Bare:
    """Torch loops over the network of Figure 3 on random images."""

    def __init__(self, batch: int, block: int) -> None:
        torch.manual_seed(0)
        self.model = build_network("digits-cnn", in_channels=1, num_classes=10)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.data = torch.randn(batch, 1, 16, 16), torch.randint(10, (batch,))
        self.images = torch.randn(block, 1, 16, 16)

    def step(self) -> float:
        """Return the median processor time of a training step."""
        self.model.train()
        return _median(self._step, 200)

    def image(self) -> float:
        """Return the median processor time of an image forwarded."""
        self.model.eval()
        with torch.no_grad():
            return _median(lambda: self.model(self.images), 200) / len(self.images)

    def _step(self) -> None:
        images, targets = self.data
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), targets).backward()
        self.optimizer.step()


def _median(act, count: int) -> float:
    found = []
    for _ in range(count):
        started = time.process_time()
        act()
        found.append(time.process_time() - started)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="quick", choices=["smoke", "quick"])
    parser.add_argument("--rounds", type=int, default=3, help="cold calls, each with bare loops before and after")
    parser.add_argument("--all", action="store_true", help="time `reproduce all`, too: a quarter of an hour")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    pinned()
    torch.set_num_threads(1)
    path = asked.out / "job.json"
    kept = json.loads(path.read_text()).get("all") if path.exists() else None
    whole = {"minutes": minutes_of_all(asked.setting), "goal": ALL} if asked.all else kept
    setting = SETTINGS[asked.setting]
    bare, loops = Bare(batch=3 * setting.batch_size, block=setting.block_size or 128), []
    times: dict[str, list[float]] = {name: [] for name in ("cold", "warm", "imports", "help", "python")}
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory() as folder:
            job = ("-m", "flatlab", "reproduce", "fig3", "--setting", asked.setting, "--store", f"{folder}/runs")
            job += ("--out", folder)
            loops.append((bare.step(), bare.image()))
            times["cold"].append(processor_time(*job))
            loops.append((bare.step(), bare.image()))
            for _ in range(3):
                times["warm"].append(processor_time(*job))
                times["imports"].append(processor_time("-c", "import pandas, matplotlib.pyplot"))
                times["help"].append(processor_time("-m", "flatlab", "--help"))
                times["python"].append(processor_time("-c", "pass"))
            count = counted(setting, RunStore(f"{folder}/runs"))
    step, image = (statistics.median(each) for each in zip(*loops, strict=True))
    seconds = {name: statistics.median(each) for name, each in times.items()}
    seconds["bare"] = count["steps"] * step + count["images"] * image
    ratios = {
        "cold over bare": [seconds["cold"] / seconds["bare"], COLD],
        "warm over imports": [seconds["warm"] / seconds["imports"], WARM],
        "help over python": [seconds["help"] / seconds["python"], HELP],
    }
    record = {"machine": environment.facts(), "setting": asked.setting, **count, "seconds": seconds, "ratios": ratios}
    record |= {"all": whole} if whole else {}
    asked.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
