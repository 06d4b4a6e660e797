"""The largest noise on the weights at a given accuracy: PAC-Bayes' sigma; and the rise of the loss under rounding.

Definitions FOUND in nitarshan/robust-generalization-measures (measures.py), which follows Jiang et al. 2020
(arXiv 1912.02178) and Dziugaite et al. 2020 (arXiv 2010.11924). That code passes the variance to a function that takes
the standard deviation; here sigma is the standard deviation.
"""

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import whole
from flatlab.derivatives.operators import Hessian
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import draw_direction
from flatlab.results.estimate import Estimate, mean_of
from flatlab.seeds import base_seed, generator

HIGHEST = 2.0  # of sigma
SMALLEST = 2.0**-14  # a smaller sigma is returned as 0
PRECISION = 0.02  # of sigma, relative: less than its variation between draws
EPSILON = 1e-3  # standard deviation that relative noise has at a weight of zero


def largest_noise(
    landscape: Landscape,
    *,
    relative: bool = False,
    drop: float = 0.1,
    num_samples: int = 10,
    seed: int | torch.Generator = 0,
) -> float:
    """Return the largest sigma, at most 2, under whose noise the mean accuracy falls by no more than `drop`.

    Found by bisection to 2 %; the draws are the same at each sigma.

    Args:
        landscape: the loss around w, of a network that classifies.
        relative: noise has the variance sigma^2 w_i^2 + 0.001^2 (magnitude-aware) instead of sigma^2.
        drop: of the accuracy, from 0 to 1.
        num_samples: draws of normal noise, each on all images.
        seed: of the draws.

    Raises:
        UserError: if a number is out of range, or the loss has no accuracy.
    """
    if not 0 < drop < 1:
        raise UserError(f"drop must be a share of the images between 0 and 1, got {drop}.")
    count, name = whole("num_samples", num_samples), base_seed(seed)
    home = landscape.evaluate().accuracy
    if home is None:
        raise UserError("The largest noise is defined by the accuracy: the outputs must be the logits of classes.")
    draws = [draw_direction(landscape, name, index, noise="normal") for index in range(count)]

    def kept(sigma: float) -> bool:
        spread = (sigma**2 * landscape.point.square() + EPSILON**2).sqrt() if relative else sigma
        found = [landscape.evaluate(landscape.point + spread * draw).accuracy for draw in draws]
        return home - float(np.mean(np.array(found, dtype=float))) <= drop

    if kept(HIGHEST):
        return HIGHEST
    low, high = SMALLEST, HIGHEST
    while high > (1 + PRECISION) * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return low if low > SMALLEST else 0.0


def rounding_penalty(
    landscape: Landscape, steps: Tensor, *, num_samples: int = 32, seed: int | torch.Generator = 0
) -> Estimate:
    """Estimate sum_i s_i^2 H_ii / 24, the rise of the loss under noise on (-s_i / 2, s_i / 2), to second order.

    The penalty by which QGen (arXiv 2404.11769) describes the expected loss of rounded weights; on a quadratic loss it
    is the expected rise. It is the mean of z' D H z over random signs z, with D = diag(s^2) / 24.

    Args:
        landscape: the loss around w.
        steps: step sizes s (P,), 0 where a parameter is not rounded.
        num_samples: vectors of signs, a product with the Hessian each.
        seed: of the vectors.

    Raises:
        UserError: if `num_samples` is below 2, or `steps` has another shape than a point.
    """
    if num_samples < 2:
        raise UserError(f"num_samples must be an integer >= 2, got {num_samples}.")
    share = landscape.as_point(steps).square() / 24
    operator, rng = Hessian(landscape), generator("rounding penalty", base_seed(seed))
    signs = 2 * torch.randint(0, 2, (landscape.num_params, num_samples), generator=rng) - 1
    z = signs.to(landscape.point)
    return mean_of((z * share[:, None] * (operator @ z)).sum(0).double().cpu().numpy())


def pac_bayes(displaced: Tensor, sigma: float, relative_sigma: float, *, num_samples: int) -> dict[str, float]:
    """Return PAC-Bayes' bounds with the prior at w_0, plain and magnitude-aware: sqrt(bound / m).

    Args:
        displaced: w - w_0 (P,), or w for a prior at zero.
        sigma: from `largest_noise`.
        relative_sigma: from `largest_noise(relative=True)`.
        num_samples: m, number of training images.
    """
    squares = displaced.double().square()
    length, count = float(squares.sum()), squares.numel()
    shares = (EPSILON**2 + (relative_sigma**2 + 1) * length / count) / (EPSILON**2 + relative_sigma**2 * squares)
    plain = length / (4 * sigma**2) + np.log(num_samples / sigma) + 10
    aware = float(shares.log().sum()) / 4 + np.log(num_samples / relative_sigma) + 10
    return {"plain": float(np.sqrt(plain / num_samples)), "magnitude-aware": float(np.sqrt(aware / num_samples))}
