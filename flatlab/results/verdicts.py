"""Verdicts: p-values corrected for families of tests, and sentences from measured rises. Torch-free."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flatlab.arguments import FloatArray
from flatlab.errors import UserError
from flatlab.results.estimate import Estimate, check_level, mean_of

SURE = 2.0  # standard errors


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Return p-values adjusted by Holm's step-down method: one below alpha is significant in the family at alpha.

    The chance of one false rejection or more is then at most alpha, however the tests depend on each other
    (Holm 1979, Scand. J. Statist. 6, 65-70).

    Args:
        p_values: (m,) of the whole family. NaN, a test that could not be made, stays NaN and counts in m.

    Raises:
        UserError: where a p-value lies outside [0, 1], or they are not one row of numbers.
    """
    given = np.asarray(p_values, dtype=np.float64)
    known = np.where(np.isnan(given), 1.0, given)
    if given.ndim != 1 or (known < 0).any() or (known > 1).any():
        raise UserError(f"p_values must be one row of numbers from 0 to 1, got {p_values!r}.")
    order = np.argsort(known, kind="stable")
    factors = np.arange(len(given), 0, -1)
    adjusted = np.empty_like(known)
    adjusted[order] = np.minimum(np.maximum.accumulate(known[order] * factors), 1.0)
    return np.where(np.isnan(given), np.nan, adjusted)


def verdict(differences: Sequence[Estimate], radii: FloatArray, names: tuple[str, str], *, level: float = 0.95) -> str:
    """Return a sentence on which of two checkpoints is flatter, and at which radii.

    For example: "SAM is flatter up to radius 2; not distinguishable from radius 3 on". The level is that of the whole
    sentence: where the two are equally flat, at most 1 - level of all sentences name one of them at any radius (Holm
    over the radii). A radius at which the interval excludes 0 may thus remain undecided.

    Args:
        differences: (R,) of the first one's F less the second's.
        radii: (R,) in any order; zero is ignored, and of equal ones the first counts.
        names: of the two.
        level: of the sentence.
    """
    _, order = np.unique(radii, return_index=True)
    rows = [index for index in order.tolist() if radii[index] > 0]
    sure = holm([differences[row].p_value for row in rows]) <= 1 - check_level(level)
    spans: list[tuple[int, float, float]] = []
    for row, known in zip(rows, sure.tolist(), strict=True):
        sign, radius = (int(differences[row].value > 0) if known else -1), float(radii[row])
        if spans and spans[-1][0] == sign:
            spans[-1] = (sign, spans[-1][1], radius)
        else:
            spans.append((sign, radius, radius))
    return "; ".join(_part(spans, index, names) for index in range(len(spans))) or "no radius above 0 was measured"


def _part(spans: Sequence[tuple[int, float, float]], index: int, names: tuple[str, str]) -> str:
    sign, first, last = spans[index]
    what = f"{names[sign]} is flatter" if sign >= 0 else "not distinguishable"
    if len(spans) == 1:
        return f"{what} at all radii measured"
    if index == 0:
        return f"{what} up to radius {last:g}"
    if index == len(spans) - 1:
        return f"{what} from radius {first:g} on"
    return f"{what} at radius {first:g}" if first == last else f"{what} from {first:g} to {last:g}"


def remarks(radii: FloatArray, rises: Sequence[FloatArray], slopes: FloatArray | None) -> list[str]:
    """Return sentences on non-finite rises, and on radii where the slope at w dominates the rise.

    Args:
        radii: (R,) in any order.
        rises: for each radius, of the draws (J,).
        slopes: products (K,) of slopes along directions (`slope.slopes`) of the same images; None where they were not
            measured, and get no remark.
    """
    return [*_broken(radii, rises), *_tilted(radii, rises, slopes)]


def missed(radii: FloatArray, stopped: Sequence[str], errors: FloatArray) -> list[str]:
    """Return sentences on the radii where sampling ended before the requested accuracy was reached.

    Args:
        radii: (R,).
        stopped: for each radius why sampling ended: "budget" and "interrupted" are too early.
        errors: (R,) standard errors.
    """
    sentences = []
    for reason, why in (("budget", "The budget was spent"), ("interrupted", "Sampling was interrupted")):
        where = [
            f"{radius:g} (standard error {error:.2g})"
            for radius, stop, error in zip(radii, stopped, errors, strict=True)
            if stop == reason
        ]
        if where:
            sentences.append(f"{why} before the requested accuracy was reached at radius {', '.join(where)}.")
    return sentences


def _broken(radii: FloatArray, rises: Sequence[FloatArray]) -> list[str]:
    shares = [float((~np.isfinite(each)).mean()) if len(each) else 0.0 for each in rises]
    found = zip(shares, radii, strict=True)
    where = [f"{share:.1%} of the draws at radius {radius:g}" for share, radius in found if share]
    return [f"The loss is not finite in {', '.join(where)}; F is undefined there."] if where else []


def _tilted(radii: FloatArray, rises: Sequence[FloatArray], slopes: FloatArray | None) -> list[str]:
    found = [(float(radius), _tilt(float(radius), each, slopes)) for radius, each in zip(radii, rises, strict=True)]
    if not (where := [(radius, how) for radius, how in found if how]):
        return []
    radius, how = max(where)
    return [
        f"w is not near a minimum of these data: up to radius {radius:g} the slope outweighs the curvature ({how})."
        " F is then still the mean rise, but does not characterise a minimum."
    ]


def _tilt(radius: float, rises: FloatArray, slopes: FloatArray | None) -> str:
    """Return a comparison of slope and mean rise at a radius; empty where the slope does not outweigh the rise."""
    if slopes is None or not (radius > 0 and len(rises) and np.isfinite(rises).all()):
        return ""
    found, mean = mean_of(slopes), float(rises.mean())
    sure = found.value - SURE * found.stderr > (mean / radius) ** 2
    return (
        f"along a direction the loss changes by {radius * found.value**0.5:.2g} nats, and F is {mean:.2g}"
        if sure
        else ""
    )
