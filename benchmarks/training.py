"""How busy the training keeps its device: the loop, the same loop fed with one constant batch, and DomainBed's way.

    python benchmarks/training.py --data-dir /data --model mobilenet_v2 --image-size 64 --device cpu

Rounds of the three alternate, so that a machine that others use as well slows all of them alike; the shares are medians
over rounds of the ratio within a round. Without --data-dir a small tree of noise is made, 300 x 225 JPEGs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import datasets, transforms

from flatlab.data import load as data_load
from flatlab.data.batches import Batch, TrainingStream
from flatlab.data.domains import DomainSet, split
from flatlab.models.networks import build_network, set_training

DOMAINS = ("art_painting", "cartoon", "photo")  # the sources where sketch is held out
PER_DOMAIN = 32


def trainer(args: argparse.Namespace) -> Callable[[torch.Tensor, torch.Tensor], None]:
    network = build_network(args.model, num_classes=7).to(args.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-5, fused=True)
    set_training(network, freeze_batchnorm=True)

    def update(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = network(inputs)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return update


def ours(data: DomainSet, args: argparse.Namespace) -> Iterator[Batch]:
    rows = {name: split(len(data.domain(name)), data.index(name), trial_seed=0).in_ for name in DOMAINS}
    device = torch.device(args.device)
    stream = TrainingStream(data, rows, batch_size=PER_DOMAIN, seed=0, device=device, augmented=True)
    step = 0
    while True:
        yield stream.batch(step)
        step += 1


def constant(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def domainbeds(root: Path, args: argparse.Namespace) -> Iterator[Batch]:
    """Decode and augment each image each time, in worker processes, a loader for each domain."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.image_size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize(data_load.IMAGENET_MEAN, data_load.IMAGENET_STD),
        ]
    )
    loaders = []
    for name in DOMAINS:
        folder = datasets.ImageFolder(str(root / name), transform)
        sampler = RandomSampler(folder, replacement=True, num_samples=10**9)
        loaders.append(iter(DataLoader(folder, PER_DOMAIN, sampler=sampler, num_workers=args.workers)))
    for shares in zip(*loaders, strict=True):
        inputs, targets = (torch.cat(parts).to(args.device) for parts in zip(*shares, strict=True))
        yield Batch(inputs.contiguous(memory_format=torch.channels_last), targets, (PER_DOMAIN,) * 3)


def seconds_per_step(source: Iterator[Batch], update: Callable[..., None], args: argparse.Namespace) -> float:
    def wait() -> None:
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()

    wait()
    started = time.perf_counter()
    for _ in range(args.steps):
        batch = next(source)
        update(batch.inputs, batch.targets)
    wait()
    return (time.perf_counter() - started) / args.steps


def noise(root: Path) -> Path:
    """Make a small tree in PACS's shape."""
    random = np.random.RandomState(0)
    for name in (*DOMAINS, "sketch"):
        for each in ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person"):
            (root / name / each).mkdir(parents=True)
            for k in range(10):
                small = Image.fromarray(random.randint(0, 256, (15, 20, 3), dtype=np.uint8))
                small.resize((300, 225)).save(root / name / each / f"{k}.jpg")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--workers", type=int, default=1, help="of DomainBed's way, for each domain; 0: none")
    parser.add_argument("--steps", type=int, default=5, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data_dir / "PACS" if args.data_dir else noise(Path(folder) / "PACS")
        cache = args.cache or (None if args.data_dir else Path(folder) / "cache")
        data = data_load.load("PACS", data_dir=root, image_size=args.image_size, cache=cache)
        report(measure(data, root, args), args)


def measure(data: DomainSet, root: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    update, first = trainer(args), next(ours(data, args))
    feeds = {"constant": constant(first), "flatlab": ours(data, args), "domainbed": domainbeds(root, args)}
    for feed in feeds.values():  # warm up: kernels, workers, the files' pages
        seconds_per_step(feed, update, args)
    seconds: dict[str, list[float]] = {name: [] for name in feeds}
    for _ in range(args.rounds):
        for name, feed in feeds.items():
            seconds[name].append(seconds_per_step(feed, update, args))
    return seconds


def report(seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    told = {"model": args.model, "image_size": args.image_size, "device": args.device, "precision": args.precision}
    for name, own in seconds.items():
        shares = [constant / each for constant, each in zip(seconds["constant"], own, strict=True)]
        print(
            f"{name:10} {1e3 * statistics.median(own):8.1f} ms a step  {statistics.median(shares):6.1%} of constant "
            f"(rounds {min(shares):.1%} to {max(shares):.1%})",
            file=sys.stderr,
        )
        told[name] = {"seconds": statistics.median(own), "share": statistics.median(shares)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
