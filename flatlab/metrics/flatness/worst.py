"""The worst direction on a sphere by projected gradient ascent, which gives a lower bound of the largest rise."""

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatlab.arguments import distances, whole
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.caveats import rounded
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.results.estimate import Cost
from flatlab.results.sharpness import WorstRise
from flatlab.seeds import base_seed

FIRST_ANGLE = 0.5  # radians of the first step on the sphere; halved whenever the loss does not increase
BACKWARD = 3  # cost of a gradient in passes, its forward pass included


def worst_rise(
    landscape: Landscape,
    radii: npt.ArrayLike,
    *,
    restarts: int = 5,
    steps: int = 20,
    seed: int | torch.Generator = 0,
) -> WorstRise:
    """Ascend on spheres around w from random starts; the first start is the direction of the gradient at w.

    Each step turns the direction towards the tangential gradient by an angle, which is halved if the loss does not
    rise; all data are used, and the point stays on the sphere exactly. On a quadratic loss at its minimum the
    maximum is gamma^2 lambda_max / 2.

    Args:
        landscape: the loss around w.
        radii: (R,) Euclidean distances above zero.
        restarts: ascents at each radius.
        steps: gradient steps of an ascent.
        seed: of the starts.

    Raises:
        UserError: if a radius is not positive, or too small for the weights' precision, or restarts or steps are
            below 1.
    """
    places = distances("radii", radii, above=0.0)
    whole("restarts", restarts)
    whole("steps", steps)
    if lost := rounded(landscape, places):
        raise UserError(lost)
    start, named = time.perf_counter(), base_seed(seed)
    rises = np.array([[_climb(landscape, gamma, steps, named, k) for k in range(restarts)] for gamma in places])
    passes = len(places) * restarts * (1 + steps * (BACKWARD + 1))
    cost = Cost(passes, passes * landscape.num_samples, 0, time.perf_counter() - start)
    return WorstRise(radii=places, rises=rises, steps=steps, seed=named, cost=cost)


def _climb(landscape: Landscape, gamma: float, steps: int, seed: int, k: int) -> float:
    """Return the rise at the end of one ascent."""
    w, base = landscape.point, float(landscape.base_loss.mean())
    slope = landscape.gradient() if k == 0 else w.new_zeros(())
    here = _unit(slope) if slope.norm() > 0 else draw_direction(landscape, seed, k)
    height, angle = landscape.evaluate(w + gamma * here).loss, FIRST_ANGLE
    for _ in range(steps):
        uphill = landscape.gradient(w + gamma * here)
        tangent = uphill - (uphill @ here) * here
        if not tangent.norm() > 0:
            break  # a critical point on this sphere
        there = _unit(np.cos(angle) * here + np.sin(angle) * _unit(tangent))
        reached = landscape.evaluate(w + gamma * there).loss
        if reached > height:
            here, height = there, reached
        else:
            angle /= 2
    return height - base


def _unit(vector: Tensor) -> Tensor:
    return torch.div(vector, vector.norm())
