"""Adaptive sharpness, average and worst case (Andriushchenko et al. 2023, arXiv 2302.07011; Kwon et al. 2021).

A perturbation is delta = c u, entry by entry, where c = |w| makes it adaptive (a rescaling of weights that does not
change the function does not change the sharpness) and c = 1 does not. In the average case u = rho z with z normal
("l2") or uniform on [-1, 1] ("linf") in each entry; in the worst case |u| <= rho in that norm, for each block of m
images.
"""

import math
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.arguments import FloatArray, distances, whole
from flatlab.errors import choose
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.sphere import sample
from flatlab.metrics.flatness.worst import BACKWARD
from flatlab.results.estimate import Cost
from flatlab.results.sharpness import AverageSharpness, Norm, WorstSharpness
from flatlab.seeds import base_seed

NORMS = ("l2", "linf")
BLOCK = 128  # images m of a block, as in the authors' runs
MOMENTUM = 0.75  # share of the new step (Auto-PGD, Croce and Hein 2020)
CLIMBING = 0.75  # share of steps that must find a larger loss, or steps are halved


def normalised_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of logits (n, C) that are centred and scaled to length 1 for each sample.

    The scale of the logits, which training can increase arbitrarily, then does not affect sharpness.

    Args:
        loss: such as torch.nn.functional.cross_entropy.
    """

    def of(logits: Tensor, targets: Tensor) -> Tensor:
        centred = logits - logits.mean(dim=-1, keepdim=True)
        return loss(centred / torch.linalg.vector_norm(centred, dim=-1, keepdim=True).clamp_min(1e-10), targets)

    return of


def average_sharpness(
    landscape: Landscape,
    radii: npt.ArrayLike,
    *,
    norm: Norm = "l2",
    adaptive: bool = True,
    block_size: int = BLOCK,
    num_samples: int | None = None,
    rel_error: float = 0.02,
    abs_error: float = 1e-4,
    budget: float | None = None,
    seed: int | torch.Generator = 0,
) -> AverageSharpness:
    """Measure the mean rise of the loss under random noise, with the engine of the sphere.

    Draws are antithetic pairs, each on one block of the images. On a quadratic loss with Hessian H the result is
    rho^2 sum_i H_ii c_i^2 / 2, a third of that for "linf".

    Args:
        landscape: the loss around w; with `normalised_logits(loss)` the size of the logits has no effect.
        radii: (R,) rho, relative to |w| if adaptive.
        norm: "l2" draws normal noise, "linf" uniform noise.
        adaptive: scale the noise by |w|.
        block_size: images on which one pair of draws is evaluated.
        num_samples: fixed number of draws, each on all images, instead of an accuracy target.
        rel_error: standard error over the value at which sampling stops.
        abs_error: absolute standard error (nats) at which sampling also stops.
        budget: maximum number of images forwarded; by default 100 passes for each radius.
        seed: of the draws.

    Raises:
        UserError: if a number is out of range or a name is unknown.
    """
    places = _places(radii, norm)
    noise: Literal["normal", "uniform"] = "normal" if norm == "l2" else "uniform"
    sampler = Sampler([landscape], base_seed(seed), "parameter" if adaptive else "none", noise=noise)
    (found,) = sample(sampler, places, num_samples, (rel_error, abs_error), budget, block_size=block_size)
    return AverageSharpness(
        radii=places,
        visits=found.visits,
        blocks=found.blocks,
        stopped=found.stopped,
        norm=norm,
        adaptive=adaptive,
        seed=sampler.seed,
        cost=found.cost,
    )


def worst_sharpness(
    landscape: Landscape,
    radii: npt.ArrayLike,
    *,
    norm: Norm = "linf",
    adaptive: bool = True,
    block_size: int = BLOCK,
    steps: int = 20,
    restarts: int = 1,
    seed: int | torch.Generator = 0,
) -> WorstSharpness:
    """Search the worst perturbation of each block from random starts, by Auto-PGD (Croce and Hein 2020).

    Steps begin at 2 rho, have momentum, and are halved at fixed checkpoints if too few increase the loss. The ascent is
    in u = delta / c, where the ball is round and the projection exact; the authors' code ascends in delta and bisects.

    Args:
        landscape: the loss around w; with `normalised_logits(loss)` the size of the logits has no effect.
        radii: (R,) rho, relative to |w| if adaptive.
        norm: of the ball.
        adaptive: scale perturbations by |w|.
        block_size: images m of one perturbation, a share of each stratum. The mean of the blocks' losses is the loss,
            so that no point of the ball, and no mean over it, exceeds the true maximum.
        steps: of an ascent; a step costs a gradient and a forward pass over the block.
        restarts: ascents, each from another start.
        seed: of the starts and the blocks.

    Raises:
        UserError: if a number is out of range or a name is unknown.
    """
    begin, name, places = time.perf_counter(), base_seed(seed), _places(radii, norm)
    steps, restarts = whole("steps", steps), whole("restarts", restarts)
    scale = landscape.point.abs() if adaptive else torch.ones_like(landscape.point)
    blocks = [landscape.on(block) for block in landscape.blocks(block_size, seed=name)]
    rises = np.array(
        [
            [[_Ascent(each, scale, rho, norm).climb(steps, (name, b, k)) for k in range(restarts)] for rho in places]
            for b, each in enumerate(blocks)
        ]
    )
    passes = len(places) * restarts * (1 + steps * (BACKWARD + 1))
    return WorstSharpness(
        radii=places,
        rises=rises.transpose(1, 0, 2),
        norm=norm,
        adaptive=adaptive,
        steps=steps,
        seed=name,
        cost=Cost(passes, passes * landscape.num_samples, 0, time.perf_counter() - begin),
    )


class _Ascent:
    """Auto-PGD on one block, in u = delta / c within the ball of one radius."""

    def __init__(self, block: Landscape, scale: Tensor, rho: float, norm: Norm) -> None:
        self.block, self.scale, self.rho, self.norm = block, scale, rho, norm

    def climb(self, steps: int, start: tuple[int, int, int]) -> float:
        """Return the largest rise found."""
        here = before = best = self._start(*start)
        highest, seen = self._loss(here), -math.inf  # at the last checkpoint
        size, halved, climbed, last = 2 * self.rho, False, 0, 0
        stations = _checkpoints(steps)
        for step in range(1, steps + 1):
            ahead = self._project(here + size * self._uphill(here))
            mixed = here + MOMENTUM * (ahead - here) + (1 - MOMENTUM) * (here - before)
            before, here = here, ahead if step == 1 else self._project(mixed)
            loss = self._loss(here)
            if loss > highest:
                best, highest, climbed = here, loss, climbed + 1
            if step in stations:
                stuck = climbed < CLIMBING * (step - last) or (not halved and highest == seen)
                if stuck:
                    size, here, before = size / 2, best, best
                halved, seen, climbed, last = stuck, highest, 0, step
        return max(highest - float(self.block.base_loss.mean()), 0.0)  # w itself lies in the ball

    def _loss(self, u: Tensor) -> float:
        return self.block.evaluate(self.block.point + self.scale * u).loss

    def _uphill(self, u: Tensor) -> Tensor:
        slope = self.scale * self.block.gradient(self.block.point + self.scale * u)
        return slope.sign() if self.norm == "linf" else slope / slope.norm().clamp_min(1e-30)

    def _project(self, u: Tensor) -> Tensor:
        if self.norm == "linf":
            return u.clamp(-self.rho, self.rho)
        shrink: Tensor = self.rho / u.norm().clamp_min(1e-30)
        return u * shrink.clamp_max(1.0)

    def _start(self, seed: int, block: int, restart: int) -> Tensor:
        number = -1 - restart - (block << 20)  # negative: none of the average case
        if self.norm == "linf":
            return self.rho * draw_direction(self.block, seed, number, noise="uniform")
        return self.rho * draw_direction(self.block, seed, number)


def _checkpoints(steps: int) -> set[int]:
    """Return the steps at which the step size is adapted (Croce and Hein 2020, section 3)."""
    places = [0.0, 0.22]
    while places[-1] < 1:
        places.append(places[-1] + max(places[-1] - places[-2] - 0.03, 0.06))
    return {math.ceil(place * steps) for place in places[1:]}


def _places(radii: npt.ArrayLike, norm: str) -> FloatArray:
    choose("norm", norm, NORMS)
    return distances("radii", radii)
