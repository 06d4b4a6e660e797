"""Three estimates of one number: from the rise on small spheres, the trace, and the mean of the spectral density.

On a quadratic loss F_gamma = gamma^2 tr(H) / (2 P), so that 2 P F / gamma^2, tr(H) and P times the mean eigenvalue are
one number. They are measured from independent draws; if they disagree, one of them is wrong, or the loss is not
described by its second derivatives. The latter holds for ReLU and max pooling: their kinks add to the rise at any
finite radius, and autograd ignores them.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from flatlab.arguments import FloatArray, distances
from flatlab.errors import UserError
from flatlab.landscape.landscape import Landscape
from flatlab.metrics.curvature.resumable import KeptHessian
from flatlab.metrics.flatness.sampler import Sampler
from flatlab.metrics.flatness.sphere import sample
from flatlab.metrics.units import Keep, forget
from flatlab.results.spectrum import Trace
from flatlab.results.trace_check import TraceCheck
from flatlab.seeds import base_seed

RISES = (1e-3, 1.0, 7)  # smallest and largest rise (nats) of a quadratic at the radii, and their number
KINKS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)


def trace_check(
    landscape: Landscape,
    *,
    radii: npt.ArrayLike | None = None,
    rel_error: float = 0.05,
    density: tuple[int, int] = (32, 3),
    seed: int | torch.Generator = 0,
    keep: Keep = forget,
) -> TraceCheck:
    """Measure the trace of the Hessian in three ways, from independent draws.

    Args:
        landscape: of a smooth loss: see above for ReLU.
        radii: of the spheres, ascending; by default seven at which a quadratic of the measured trace rises by 0.001 to
            1 nat.
        rel_error: relative standard error of rise and trace.
        density: starts and Lanczos steps of the density; its first moment depends only on the starts.
        seed: of the three draws, which are independent.
        keep: stores units: of the sphere's sampling, trace and density, and how products are made.

    Raises:
        UserError: if the radii are not positive, or the loss has no curvature to compare.
    """
    name, hessian = base_seed(seed), KeptHessian(landscape, keep)
    trace = hessian.trace(rel_error=rel_error, seed=name)
    spectrum = hessian.density(num_vectors=density[0], steps=density[1], seed=name)
    places = _radii(landscape, trace) if radii is None else np.sort(distances("radii", radii, above=0.0))
    sampler = Sampler([landscape], name, "none", keep=keep)
    (flatness,) = sample(sampler, places, None, (rel_error, 0.0), None)
    return TraceCheck(
        cost=flatness.cost + trace.cost + spectrum.cost,
        flatness=flatness,
        trace=trace,
        density=spectrum,
        kinks=kinks_of(landscape.model),
    )


def kinks_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the types of modules in a model that are not smooth."""
    return tuple(sorted({type(m).__name__ for m in model.modules() if isinstance(m, (*KINKS, *POOLS))}))


def _radii(landscape: Landscape, trace: Trace) -> FloatArray:
    size = abs(trace.trace.value)
    if not size > 0:
        raise UserError(f"The trace of the Hessian must be finite and not 0 to choose radii, got {size:g}: pass radii.")
    return np.asarray(np.sqrt(2 * landscape.num_params * np.geomspace(*RISES) / size))
