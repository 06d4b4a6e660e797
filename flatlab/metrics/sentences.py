"""What measured rises say, in sentences. Torch-free."""

from collections.abc import Sequence

import numpy as np

from flatlab.metrics.results import FloatArray, mean_of

FALLING = 0.16  # of all rays: where the linear term's spread is as large as F, the loss falls along so many, Phi(-1)
SURE = 2.0  # standard errors


def verdict(low: FloatArray, high: FloatArray, radii: FloatArray, names: tuple[str, str]) -> str:
    """Say which of two checkpoints is flatter, and where: "SAM is flatter up to radius 2; not distinguishable beyond".

    Args:
        low: (R,) lower ends of the intervals of the first one's F less the second's.
        high: (R,) upper ends.
        radii: (R,) of which zero says nothing.
        names: of the two.
    """
    signs = np.where(high < 0, 0, np.where(low > 0, 1, -1))[radii > 0]
    spans: list[tuple[int, float, float]] = []
    for sign, radius in zip(signs.tolist(), radii[radii > 0].tolist(), strict=True):
        if spans and spans[-1][0] == sign:
            spans[-1] = (sign, spans[-1][1], radius)
        else:
            spans.append((sign, radius, radius))
    parts = []
    for index, (sign, first, last) in enumerate(spans):
        what = f"{names[sign]} is flatter" if sign >= 0 else "not distinguishable"
        if len(spans) == 1:
            where = "at all radii measured"
        elif index == 0:
            where = f"up to radius {last:g}"
        else:
            where = f"from radius {first:g} on" if index == len(spans) - 1 else f"from {first:g} to {last:g}"
        parts.append(f"{what} {where}")
    return "; ".join(parts)


def remarks(
    radii: FloatArray, rises: Sequence[FloatArray], blocks: Sequence[int], slopes: FloatArray | None
) -> list[str]:
    """Say where rises are not finite, and where the slope at w dominates them.

    Args:
        radii: (R,).
        rises: for each radius, of the visits (J,).
        blocks: (R,) of the images; with one, each visit is a ray on all images.
        slopes: products (K,) of slopes along rays, as `slope.slopes` returns them, of the same images.
    """
    return [*_broken(radii, rises), *_tilted(radii, rises, blocks, slopes)]


def _broken(radii: FloatArray, rises: Sequence[FloatArray]) -> list[str]:
    shares = [float((~np.isfinite(each)).mean()) if len(each) else 0.0 for each in rises]
    where = [f"{share:.1%} at radius {radius:g}" for radius, share in zip(radii, shares, strict=True) if share]
    return [f"Not finite is the loss of {', '.join(where)}: F is not defined there."] if where else []


def _tilted(
    radii: FloatArray, rises: Sequence[FloatArray], blocks: Sequence[int], slopes: FloatArray | None
) -> list[str]:
    found = [(float(r), _tilt(float(r), each, b, slopes)) for r, each, b in zip(radii, rises, blocks, strict=True)]
    if not (where := [(radius, how) for radius, how in found if how]):
        return []
    radius, how = where[-1]
    return [
        f"w is not near a minimum of these data: up to radius {radius:g} the slope outweighs the curvature ({how})."
        " F is then still the mean rise, but says little of a minimum."
    ]


def _tilt(radius: float, rises: FloatArray, blocks: int, slopes: FloatArray | None) -> str:
    """Say how much the slope weighs at a radius; nothing where it does not outweigh the mean rise."""
    known = slopes is not None or blocks == 1
    if not (known and radius > 0 and len(rises) and np.isfinite(rises).all()):
        return ""
    if slopes is None:
        falling = float((rises < 0).mean())
        spread = np.sqrt(FALLING * (1 - FALLING) / len(rises))
        return f"the loss falls along {falling:.0%} of the rays" if falling - SURE * spread > FALLING else ""
    found, mean = mean_of(slopes), float(rises.mean())
    sure = found.value - SURE * found.stderr > (mean / radius) ** 2
    return f"a ray rises or falls by {radius * found.value**0.5:.2g} nats, and F is {mean:.2g}" if sure else ""
