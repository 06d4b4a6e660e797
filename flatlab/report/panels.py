"""The panels of figures and tables: the domains trained on and the one held out, and the splits of their images.

`in`, `out` and `test` are the splits of a domain (80/20, or 60/20/20 where images are kept for a test). Torch-free.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

SOURCE, TARGET = "source", "target"
TITLES = {SOURCE: "source domains", TARGET: "held-out domain"}
ACCURACY = {  # panel and split of an accuracy -> its title
    (SOURCE, "out"): "source domains, out split (selected on)",
    (SOURCE, "test"): "source domains, test split",
    (TARGET, "in"): "held-out domain",
}


def masks(strata: Iterable[str], held_out: str) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for each panel which strata (domains) are its own.

    Args:
        strata: the domains' names, in order.
        held_out: the domain that was not trained on.
    """
    target = np.array([name == held_out for name in strata], dtype=bool)
    return {SOURCE: ~target, TARGET: target}
