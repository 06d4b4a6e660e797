"""Dependence of flatness measures on the parametrisation: layers are rescaled such that the function is unchanged.

A measure that changes nevertheless describes the parametrisation, not the function (Dinh et al. 2017). All spheres
use common directions, so that an invariant measure gives the same number up to rounding.
"""

import time

import numpy as np
import torch

from flatlab.arguments import Normalisation
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.resumable import KeptHessian
from flatlab.metrics.flatness.compare import paired_difference
from flatlab.metrics.flatness.perturbations import reach
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.sphere import sample
from flatlab.metrics.rescaling import find_pairs, rescaled
from flatlab.metrics.units import Keep, forget
from flatlab.results.estimate import Cost
from flatlab.results.scale_audit import WAYS, ScaleAudit
from flatlab.seeds import base_seed
from flatlab.tensors.calls import call
from flatlab.tensors.nested import tensors

SPHERES: dict[str, Normalisation] = {
    "sphere, raw": "none",
    "sphere, by layer": "layer",
    "sphere, by filter": "filter",
    "sphere, by parameter (adaptive)": "parameter",
}
CURVATURES = ("trace", "top eigenvalue")
SHARE = 0.1  # of the weights' norm: the radius of all spheres
DIRECTIONS = 20


def scale_audit(
    landscape: Landscape,
    *,
    most: float = 4.0,
    num_samples: int = DIRECTIONS,
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
) -> ScaleAudit:
    """Rescale layers without changing the function, and report how much the measures of flatness change.

    Args:
        landscape: around the network, in eval mode, plain weights (a quantized one baked).
        most: the largest factor.
        num_samples: common directions of the spheres, whose radius is a tenth of the weights' norm.
        seed: seed of factors and directions.
        keep: stores units: of the sampling, traces and eigenvalues, and the method of products.

    Raises:
        UserError: if no two layers can be rescaled, with the reasons, or rescaling changes the function.
    """
    if not most > 1:
        raise UserError(f"most must be > 1, got {most}.")
    start, name = time.perf_counter(), base_seed(seed)
    pairs, refusals = find_pairs(landscape.model)
    if not pairs:
        reasons = "; ".join(f"{each.first}: {each.reason}" for each in refusals) or "it has no two layers in a row"
        raise UserError(f"Nothing in {type(landscape.model).__name__} can be rescaled without a change: {reasons}.")
    others = [landscape.around(rescaled(landscape.model, pairs, by=way, most=most, seed=name)) for way in WAYS]
    deviation = np.array([_deviation(landscape, other) for other in others])
    rows = [_sphere(landscape, others, kind, num_samples, name, keep) for kind in SPHERES.values()]
    hessians = [KeptHessian(each, keep, name=f"{index}-") for index, each in enumerate([landscape, *others])]
    curvatures, curvature_cost = _curvatures(hessians, name)
    values = np.array([*(row[0] for row in rows), *curvatures])
    blank = np.full((len(CURVATURES), 2), np.nan)
    cost = sum((row[3] for row in rows), curvature_cost)
    return ScaleAudit(
        measures=(*SPHERES, *CURVATURES),
        before=values[:, 0],
        after=values[:, 1:].T,
        low=np.vstack([*(row[1] for row in rows), blank]).T,
        high=np.vstack([*(row[2] for row in rows), blank]).T,
        deviation=deviation,
        pairs=tuple(pairs),
        refusals=tuple(refusals),
        most=most,
        seed=name,
        cost=Cost(cost.forward_passes, cost.images, cost.hvps, time.perf_counter() - start),
    )


def _deviation(landscape: Landscape, other: Landscape) -> float:
    """Return the largest change of an output, as a share of the largest output.

    Raises:
        UserError: if that is more than rounding.
    """
    off = size = 0.0
    with torch.no_grad():
        for inputs, _, _ in landscape.terms():
            for a, b in zip(tensors(call(landscape.model, inputs)), tensors(call(other.model, inputs)), strict=True):
                off, size = max(off, float((a - b).abs().max())), max(size, float(a.abs().max()))
    allowed = torch.finfo(landscape.point.dtype).eps ** 0.5
    if not off <= allowed * size:
        raise UserError(
            f"Rescaling must not change the outputs, got a change of {off:.1e} where the largest is {size:.1e}: the"
            " network uses its weights in a way that its graph does not show."
        )
    return off / size if size else 0.0


def _sphere(
    landscape: Landscape, rescalings: list[Landscape], kind: Normalisation, num_samples: int, seed: int, keep: Keep
) -> tuple[list[float], list[float], list[float], Cost]:
    """Return values, and ends of the ratios' intervals, along common directions."""
    radius = SHARE * landscape.norm / reach(landscape, kind)
    own = [landscape, *rescalings]
    sampler = Sampler(own, seed, kind, keep=lambda units: keep([(f"{kind}-{n}", c) for n, c in units]))
    base, *others = sample(sampler, [radius], num_samples, (0.0, 0.0), None)
    ratios = [paired_difference(other, base).ratio() for other in others]
    values = [float(each.value[0]) for each in (base, *others)]
    cost = sum((each.cost for each in others), base.cost)
    return values, [float(low[0]) for _, low, _ in ratios], [float(high[0]) for *_, high in ratios], cost


def _curvatures(hessians: list[KeptHessian], seed: int) -> tuple[list[list[float]], Cost]:
    """Return the traces and the largest eigenvalues."""
    traces = [each.trace(rel_error=0.05, budget=100, seed=seed) for each in hessians]
    tops = [each.top(tol=1e-2, seed=seed) for each in hessians]
    cost = sum((*(each.cost for each in traces), *(cost for _, cost in tops)), Cost())
    return [[each.trace.value for each in traces], [value for value, _ in tops]], cost
