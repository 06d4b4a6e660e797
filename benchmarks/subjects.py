"""What the efficiency benchmark measures: real networks, trained by flatlab's own command, on real images."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flatlab import Place, Run, RunStore, network_of
from flatlab.data.batches import evaluation_batches
from flatlab.loading import data as loading_data

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
WEIGHTS = "weights/mobilenet_v2-imagenet-fp16.safetensors"
SPARE = 3  # images of each class of a fifth domain, that is held out so that all four of PACS are seen

MOBILENET = (
    "--held-out spare --model mobilenet_v2 --image-size 48 --steps 400 --eval-every 200 --batch-size 24 --lr 3e-4"
)
DIGITS = "--held-out rot45 --setting quick"


@dataclass(frozen=True)
class Subject:
    """A network and its images."""

    name: str
    words: str
    folder: Path  # of its one run
    options: tuple[str, ...]
    data_dir: Path | None = None

    def run(self) -> Run:
        """Return the trained run; trains it where it is missing."""
        command = [sys.executable, "-m", "flatlab", "train", "--method", "erm", "--workers", "1", "--store"]
        subprocess.run([*command, str(self.folder), *self.options], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        (run,) = RunStore(self.folder).runs()
        return run

    def load(self, count: int | None) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
        """Return the network and about `count` training images, as many of each source domain, or all of them."""
        run = self.run()
        place = Place(device="cpu", data_dir=None if self.data_dir is None else str(self.data_dir))
        domains = loading_data.domains(run.spec, place)
        limit = None if count is None else -(-count // len(domains.sources))
        loaded = {}
        for name in domains.sources:
            batches = evaluation_batches(domains.data, name, domains.in_[name], device=torch.device("cpu"), limit=limit)
            loaded[name] = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
        return network_of(run, "last", place), loaded


def mobilenet(work: Path, shared: Path) -> Subject | None:
    """Return MobileNetV2 on PACS, or None where the shared data are not at hand."""
    if not (shared / WEIGHTS).exists():
        return None
    folder = pacs_and_spare(shared / "PACS", work / "PACS-spare")
    options = ("--dataset", f"folder:{folder}", "--weights", str(shared / WEIGHTS), *MOBILENET.split())
    words = "MobileNetV2 (pretrained, fine-tuned 400 steps) on PACS at 48 pixels"
    return Subject("mobilenet", words, work / "runs-mobilenet", options, folder)


def digits(work: Path) -> Subject:
    """Return the small network on the embedded digits."""
    return Subject("digits", "digits-cnn on the embedded digits", work / "runs-digits", tuple(DIGITS.split()))


def pacs_and_spare(pacs: Path, folder: Path) -> Path:
    """Link PACS and a small fifth domain: a network that has seen all four is near a minimum on 8,000 images."""
    for source in sorted(pacs.glob("*/*")):
        images = sorted(source.iterdir())
        _link(images, folder / source.parent.name / source.name)
        if source.parent.name == "photo":
            _link(images[:SPARE], folder / "spare" / source.name)
    return folder


def _link(images: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in images:
        link = folder / image.name
        if not link.exists():
            link.symlink_to(image.resolve())
