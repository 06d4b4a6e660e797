"""The panels of figures and tables: the source domains and the held-out one, and the splits of their images.

`in`, `out` and `test` are the splits of a domain (80/20, or 60/20/20 with a test split). Torch-free.
"""

from collections.abc import Iterable

from flatlab.results.sphere import SphereFlatness
from flatlab.specs.run import RunSpec

SOURCE, TARGET = "source", "target"
TITLES = {SOURCE: "source domains", TARGET: "held-out domain"}
IMAGES = ("dataset", "image_size", "held_out", "trial_seed", "holdout", "test_share")  # fields that determine them
ACCURACY = {  # panel and split of an accuracy -> its title
    (SOURCE, "out"): "source domains, out split (selected on)",
    (SOURCE, "test"): "source domains, test split",
    (TARGET, "in"): "held-out domain",
    (TARGET, "out"): "held-out domain, out split",
    (TARGET, "all"): "held-out domain, both splits",
    (SOURCE, "percentile"): "source domains, test split, percentile over groups",
    (TARGET, "percentile"): "held-out domain, percentile over groups",
}


def strata_of(strata: Iterable[str], panel: str, held_out: str) -> list[str]:
    """Return the strata (domains) of a panel, in their order.

    Args:
        strata: the domains' names.
        panel: "source" or "target" (the held-out domain).
        held_out: the domain that was not trained on.
    """
    return [name for name in strata if (name == held_out) == (panel == TARGET)]


def part_of(found: SphereFlatness, panel: str, held_out: str) -> SphereFlatness:
    """Return a measurement on the domains of a panel, as in `strata_of`."""
    return found.of(strata_of(found.strata, panel, held_out))


def images_of(spec: RunSpec, panel: str) -> tuple[object, ...]:
    """Return what determines the images of a panel: runs can be compared where it is equal."""
    return (*(getattr(spec, name) for name in IMAGES), spec.corruption if panel == TARGET else None)
