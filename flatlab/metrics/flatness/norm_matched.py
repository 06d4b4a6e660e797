"""Comparison of a perturbation with random perturbations of the same norm, by the rise of the loss.

The norms agree on the whole ("none"), in each layer, in each filter, or in each parameter, as for the directions of
spheres.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flatlab.arguments import FloatArray, Normalisation, whole
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.flatness.perturbations import check_normalisation
from flatlab.metrics.flatness.sampler import Goal, Sampler
from flatlab.metrics.units import Keep, Unit, forget
from flatlab.results.rounding import RoundingRise, cost_of
from flatlab.results.sphere import SamplingPlan
from flatlab.seeds import base_seed
from flatlab.tensors.flat import length


def typical_rise(
    landscape: Landscape,
    perturbations: Mapping[str, Tensor],
    *,
    normalisation: Normalisation = "none",
    num_samples: int = 100,
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
) -> RoundingRise:
    """Measure the rise of the loss at w + e, and at random perturbations with the norm of e, each on all the data.

    Args:
        landscape: the loss around w.
        perturbations: vectors e (P,) by name.
        normalisation: what has the norm of e: the whole vector ("none"), or each layer, filter or parameter.
        num_samples: K random perturbations for each perturbation.
        seed: seed of the directions; random perturbations of equal index are one direction, scaled.
        keep: stores units, which makes the measurement resumable.

    Raises:
        UserError: if a perturbation is not a point of the landscape, not finite or zero, or K is below 2.
    """
    whole("num_samples", num_samples, least=2)
    if not perturbations:
        raise UserError("perturbations must be a mapping from names to vectors, with at least one, got none.")
    start = time.perf_counter()
    sampler = Sampler([landscape], base_seed(seed), check_normalisation(normalisation, landscape), keep=keep)
    vectors = {name: _checked(name, landscape.as_point(each)) for name, each in perturbations.items()}
    own = [_own(landscape, name, vector, keep) for name, vector in vectors.items()]
    draws = [_draws(sampler, name, vector, num_samples) for name, vector in vectors.items()]
    cost = cost_of(len(vectors), num_samples, landscape.num_samples)
    return RoundingRise(
        names=tuple(vectors),
        norms=np.array([float(length(each)) for each in vectors.values()]),
        rises=np.array([rises[0] for rises in own]),
        reverses=np.array([rises[1] for rises in own]),
        visits=tuple(draws),
        strata=landscape.strata,
        normalisation=sampler.normalisation,
        num_params=landscape.num_params,
        norm=landscape.norm,
        cost=replace(cost, seconds=time.perf_counter() - start),
    )


def _checked(name: str, vector: Tensor) -> Tensor:
    long = float(length(vector))
    if not (np.isfinite(long) and long > 0):
        raise UserError(f"The perturbation {name!r} must be finite and not zero, but its length is {long}.")
    return vector


def _own(landscape: Landscape, name: str, vector: Tensor, keep: Keep) -> FloatArray:
    """Return the rises (2, S) at w + e and at w - e."""

    def compute() -> FloatArray:
        with landscape.moving() as at:
            return np.asarray(at(vector, [1.0, -1.0]) - landscape.base_loss)

    return next(iter(keep([(f"own-{name}", compute)])))


def _draws(sampler: Sampler, name: str, vector: Tensor, num_samples: int) -> FloatArray:
    """Return the rises (K, S) at the random perturbations: a sphere of radius 1, in units of the norms of e."""

    def keep(units: Sequence[Unit]) -> Iterator[FloatArray]:
        return sampler.keep([(f"{sampler.normalisation}-{name}-{unit}", compute) for unit, compute in units])

    (draws,) = replace(sampler, like=vector, keep=keep).run(
        [SamplingPlan(1.0, 0, visits=num_samples)], Goal(draws=num_samples)
    )
    if draws.stopped == "interrupted":
        raise KeyboardInterrupt  # completed units are stored: the next call resumes from them
    rises: FloatArray = draws.visits[0]
    return rises
