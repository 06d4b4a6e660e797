"""Trained networks with images, on which the tools for curvature meet."""

import copy
from dataclasses import dataclass

import subjects
import torch
import torch.nn.functional as F
from torch import nn

from flatlab import Landscape, seeds
from flatlab.data import digits

LAYOUTS = {"channels-last": torch.channels_last, "row-major": torch.contiguous_format}


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut (He et al. 2016)."""

    def __init__(self, into, out, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = into == out and stride == 1
        shortcut = [nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet20(channels, classes):
    """ResNet-20 of CIFAR: three stages of three blocks, 16 to 64 channels; shortcuts by 1 x 1 convolutions."""
    layers, width = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)], 16
    for out, stride in ((16, 1), (16, 1), (16, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1)):
        layers.append(Block(width, out, stride))
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


@dataclass
class Problem:
    """A network in eval mode, with images x (n, C, H, W) of classes y (n,)."""

    network: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    batch: int

    @property
    def batches(self):
        return list(zip(self.x.split(self.batch), self.y.split(self.batch), strict=True))

    @property
    def landscape(self):
        return Landscape(self.network, self.batches, F.cross_entropy)

    @torch.inference_mode()
    def forward(self):
        """Pass all images forward, batch by batch, to their loss, and do nothing else: the unit of all times."""
        return sum(F.cross_entropy(self.network(x), y, reduction="sum") for x, y in self.batches).item()

    def first(self, count):
        return Problem(self.network, self.x[:count], self.y[:count], self.batch)

    def cut(self, batch):
        return Problem(self.network, self.x, self.y, batch)

    def double(self):
        """Copy network and images in float64."""
        return Problem(copy.deepcopy(self.network).double(), self.x.double(), self.y, self.batch)

    def laid(self, layout):
        """Copy network and images into another layout of memory."""
        network = copy.deepcopy(self.network).to(memory_format=LAYOUTS[layout])
        return Problem(network, self.x.contiguous(memory_format=LAYOUTS[layout]), self.y, self.batch)


def of_subject(name):
    """Return a problem from a trained network of `subjects.py`, about as many images of each source domain, mixed."""

    def make(given):
        subject = subjects.digits(given.work) if name == "digits" else subjects.mobilenet(given.work, given.shared)
        if subject is None:
            raise SystemExit(f"MobileNetV2's weights are not below {given.shared}: give --shared.")
        network, strata = subject.load(given.samples)
        x, y = (torch.cat(parts) for parts in zip(*strata.values(), strict=True))
        mixed = torch.randperm(len(x), generator=seeds.generator("benchmarks", "mixed"))[: given.samples]
        return Problem(network, x[mixed], y[mixed], given.batch)

    return make


def on_resnet20(given):
    """Train a ResNet-20 on the digits of three rotations at 32 x 32."""
    torch.manual_seed(0)
    data = digits.load()
    images = torch.cat([domain.images for domain in data.domains[:3]]).float().div(255).sub(digits.MEAN) / digits.STD
    labels = torch.cat([domain.labels for domain in data.domains[:3]])
    images = F.interpolate(images, size=32, mode="bilinear").to(memory_format=torch.channels_last)
    network = resnet20(1, 10).to(memory_format=torch.channels_last)
    optimizer, rng = torch.optim.Adam(network.parameters(), 1e-3), seeds.generator("benchmarks", "curvature")
    for _ in range(given.steps):
        rows = torch.randint(len(images), (64,), generator=rng)
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()
    rows = torch.randperm(len(images), generator=rng)[: given.samples]
    return Problem(network.eval(), images[rows], labels[rows], given.batch)


PROBLEMS = {"digits": of_subject("digits"), "resnet20": on_resnet20, "mobilenet": of_subject("mobilenet")}
