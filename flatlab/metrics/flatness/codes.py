"""Flatness of a quantized network on its own grid: the rise of the loss at random neighbours, some codes up or down.

With step sizes s_i, F_gamma(w) = E L(w + sum_i b_i e_i) - L(w), where b_i is 1 with probability p, and e_i = +-s_i with
equal probability, inwards at an end of the range. p = gamma^2 / sum_i E e_i^2, so that the mean square length of a move
is gamma^2: F compares with that of a sphere of this radius over the same weights. Where e_i has mean zero, a quadratic
loss with Hessian H has F = p / 2 sum_i H_ii s_i^2. If rounding errors are uniform on a step, the latent weights lie as
far from w as moves with p = 1/12 do.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.arguments import FloatArray, distances, whole
from flatlab.errors import UserError
from flatlab.landscape.codes import Neighbours
from flatlab.landscape.evaluation import Move
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness import planning
from flatlab.metrics.flatness.sampler import DrawsReport, Sampler
from flatlab.metrics.flatness.sphere import assemble
from flatlab.results.sphere import SamplingPlan, SphereFlatness
from flatlab.seeds import base_seed

SHARES = (1 / 48, 1 / 12, 1 / 3, 1.0)  # of the weights, at radii "auto": 1/2, 1, 2 and 3.5 lengths of rounding noise
BLOCK = 128  # images on which one pair of moves is evaluated


def code_flatness(
    landscape: Landscape,
    neighbours: Mapping[str, tuple[Tensor, Tensor]],
    *,
    radii: npt.ArrayLike | str = "auto",
    num_samples: int | None = None,
    block_size: int = BLOCK,
    rel_error: float = 0.02,
    abs_error: float = 1e-4,
    budget: float | None = None,
    seed: int | torch.Generator = 0,
    report: DrawsReport | None = None,
) -> SphereFlatness:
    """Measure the mean rise of the loss when a random share of the weights moves by one code up or down.

    Args:
        landscape: the loss around the quantized weights, as `bake` leaves them.
        neighbours: of its weights, by `code_neighbours(network)` before `bake`.
        radii: (R,) root mean square lengths gamma of the moves, or "auto": 1/48, 1/12, 1/3 and all of the weights.
        num_samples: fixed number of moves, each on all images, instead of an accuracy target.
        block_size: images on which one pair of moves is evaluated.
        rel_error: standard error / |F| at which sampling stops.
        abs_error: absolute standard error (nats) at which sampling also stops.
        budget: maximum number of images forwarded; by default 100 passes for each radius.
        seed: of the moves.
        report: called with the draws at each radius after each unit.

    Raises:
        UserError: if a radius exceeds the length at which every weight moves, or no weight has a neighbour.
    """
    sampler = CodeSampler([landscape], base_seed(seed), "none", grid=Neighbours.of(landscape, neighbours))
    return sample(sampler, radii, num_samples, (rel_error, abs_error), budget, block_size=block_size, report=report)


@dataclass
class CodeSampler(Sampler):
    """Samples moves on the grid of one landscape instead of directions."""

    grid: Neighbours | None = None

    def losses(self, which: int, at: Move, plans: Sequence[SamplingPlan], number: int, **where: Any) -> FloatArray:
        """Return the losses (R, S) after a move, at the radii of plans of one kind; of a pair the mean."""
        assert self.grid is not None
        shares = self.grid.shares(np.array([plan.radius for plan in plans])).tolist()
        pairs = [self.grid.moves(share, self.seed, number)[: 1 + plans[0].paired] for share in shares]
        return np.array([np.mean([at(move, 1.0, **where) for move in pair], axis=0) for pair in pairs])


def sample(
    sampler: CodeSampler,
    radii: npt.ArrayLike | str,
    num_samples: int | None,
    errors: tuple[float, float],
    budget: float | None,
    *,
    block_size: int | None = None,
    report: DrawsReport | None = None,
) -> SphereFlatness:
    """Measure a sampler's landscape; the arguments are those of `code_flatness`."""
    start, grid, landscape = time.perf_counter(), sampler.grid, sampler.landscapes[0]
    assert grid is not None
    if isinstance(radii, str) and radii != "auto":
        raise UserError(f'radii must be numbers or "auto", got {radii!r}.')
    places = np.array([grid.radius(each) for each in SHARES]) if isinstance(radii, str) else distances("radii", radii)
    shares, above = grid.shares(places), planning.above_zero(places)
    goal = planning.goal_of(landscape, max(1, len(above)), num_samples, errors, budget)
    size = whole("block_size", BLOCK if block_size is None else block_size)
    size = 0 if num_samples or size >= landscape.num_samples else size
    plans = [SamplingPlan(float(each), size, paired=not num_samples, visits=num_samples or 0) for each in above]
    per_radius = sampler.run(plans, goal, report=report)
    found = assemble(sampler, 0, places, per_radius, time.perf_counter() - start)
    moved = ", ".join(f"{share:.2%}" for share in shares)
    return replace(found, notes=(*found.notes, f"By one code up or down move, by radius, {moved} of the weights."))
