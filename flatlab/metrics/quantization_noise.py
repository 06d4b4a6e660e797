"""Uniformity and symmetry of quantization noise w_q - w (arXiv 2410.06020, section 3.2 and App. L).

A histogram's divergence is biased: a sample that *is* uniform gives about (B - 1) / (2 N) nats in B bins. Each value is
therefore compared with its null distribution, that of uniform samples of the same size, drawn exactly: between the
smallest and the largest of a uniform sample, which span the bins, the others are uniform.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.results.estimate import Cost
from flatlab.results.quantization_noise import (
    BINS,
    DRAWS,
    QuantizationNoise,
    kl_null,
    symmetry,
    symmetry_null,
)

Numbers = Tensor | npt.ArrayLike
FEWEST = 8  # values of a distribution that is tested
ROUNDING = 2.4e-7  # of w / step, twice float32's: a weight moved by more than half a step was clipped


def quantization_noise(
    weight: Numbers,
    quantized: Numbers,
    *,
    step: Numbers | None = None,
    normalise: bool = False,
    bins: int = BINS,
    seed: int = 0,
) -> QuantizationNoise:
    """Compare the noise w_q - w with a uniform that has the same minimum and maximum.

    Args:
        weight: w, of any shape; channels are the first axis of more than one.
        quantized: w_q, in the same shape.
        step: step sizes that broadcast against w; with them, clipped weights are identified and excluded.
        normalise: divide by the step sizes: if these differ, pooled raw noise is a mixture, and not uniform.
        bins: B of the histogram.
        seed: of the null distributions.

    Raises:
        UserError: if shapes differ, values are not finite, or there is no noise to test.
    """
    start = time.perf_counter()
    w, w_q = _numbers(weight, "weight"), _numbers(quantized, "quantized weight")
    if w.shape != w_q.shape:
        raise UserError(f"weight and quantized must have the same shape, got {w.shape} and {w_q.shape}.")
    if normalise and step is None:
        raise UserError("normalise=True needs the step sizes, got none: pass step=..., or leave normalise out.")
    if bins < 2:
        raise UserError(f"bins must be an integer >= 2, got {bins}.")
    alive = np.broadcast_to(_alive(w), w.shape)
    steps = None if step is None else np.broadcast_to(_numbers(step, "step size"), w.shape)
    ratio = None if steps is None else (w_q - w) / steps
    kept = alive if steps is None else alive & (np.abs(w_q - w) <= 0.5 * steps + ROUNDING * np.abs(w))
    noise = np.sort((ratio if normalise and ratio is not None else w_q - w)[kept])
    if len(noise) < FEWEST or noise[0] == noise[-1]:
        raise UserError(_no_noise(w, noise))
    mirrored = symmetry(noise)
    return QuantizationNoise(
        noise=noise,
        bins=bins,
        clipped=float("nan") if ratio is None else float(1 - kept.sum() / alive.sum()),
        zero_channels=int((~_alive(w)).sum()),
        variance_ratio=float("nan") if ratio is None else float(12 * np.square(ratio[kept]).mean()),
        kl_draws=kl_null(len(noise), bins, seed=seed),
        symmetry=mirrored,
        symmetry_draws=symmetry_null(mirrored, len(noise), draws=DRAWS, seed=seed),
        cost=Cost(seconds=time.perf_counter() - start),
    )


def _numbers(values: Numbers, name: str) -> FloatArray:
    """Return values as float64; refuse those that are not finite."""
    found: Any = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(found, dtype=np.float64)
    broken = int((~np.isfinite(array)).sum())
    if broken:
        raise UserError(f"The {name} must have finite values, got {broken} of {array.size} that are not finite.")
    return array


def _alive(w: FloatArray) -> npt.NDArray[np.bool_]:
    """Return which channels have non-zero weights, shaped to broadcast; a vector is one channel."""
    axes = tuple(range(1, w.ndim)) if w.ndim > 1 else None
    return np.asarray((w != 0).any(axis=axes, keepdims=True))


def _no_noise(w: FloatArray, noise: FloatArray) -> str:
    if not w.any():
        return "The weight has only zeros, so quantization adds no noise to it."
    if len(noise) < FEWEST:
        return f"A distribution needs at least {FEWEST} weights that are not clipped, got {len(noise)} of {w.size}."
    return (
        f"The noise is {noise[0]:g} at each of {len(noise)} weights, so it has no distribution: pass the weights "
        "before quantization (a baked network has only those after it)."
    )
