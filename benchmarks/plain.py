"""SWAD's procedure (its visualization/local_flatness_test.py), plainly and well: a direction meets all images.

One ray serves all radii. In memory, without gradients, at the batch size that a probe finds fastest; nothing of
flatlab's engine is used.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = (16, 32, 64, 128, 256, 512)

Strata = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Plain:
    """The procedure on a model and the images of each domain."""

    model: nn.Module
    strata: Strata

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())
        self.start = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.batch_size = SIZES[0]
        self.batch_size = self._best()
        self.base = self.loss()

    def _best(self) -> int:
        """Return the batch size at which an image costs least; the median of three, one image size after another."""
        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        inputs = torch.cat([x for x, _ in self.strata.values()])[: 2 * SIZES[-1]]
        for _ in range(4):
            for size in SIZES:
                start = time.perf_counter()
                with torch.inference_mode():
                    for batch in inputs.split(size):
                        self.model(batch)
                seconds[size].append(time.perf_counter() - start)
        return min(SIZES, key=lambda size: float(np.median(seconds[size][1:])))

    @torch.inference_mode()
    def loss(self) -> float:
        """Return the mean of the domains' mean losses."""
        means = []
        for inputs, targets in self.strata.values():
            total = 0.0
            for x, y in zip(inputs.split(self.batch_size), targets.split(self.batch_size), strict=True):
                total += F.cross_entropy(self.model(x), y).item() * len(y)
            means.append(total / len(targets))
        return float(np.mean(means))

    @torch.no_grad()
    def forward(self) -> None:
        """Pass all images forward, and do nothing else."""
        for inputs, _ in self.strata.values():
            for x in inputs.split(self.batch_size):
                self.model(x)

    def direction(self, seed: int, radii: np.ndarray) -> np.ndarray:
        """Return the rises (R,) along one direction, the same for all radii."""
        ray = torch.randn(len(self.start), generator=torch.Generator().manual_seed(10_000 + seed))
        ray = (ray / ray.norm()).to(self.start.device)
        rises = []
        for radius in radii:
            self._put(self.start + float(radius) * ray)
            rises.append(self.loss() - self.base)
        self._put(self.start)
        return np.array(rises)

    @torch.no_grad()
    def _put(self, vector: Tensor) -> None:
        parts = vector.split([p.numel() for p in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))
