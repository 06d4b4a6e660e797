"""FQAT (our reading): does quantization from the first step sharpen and hurt out of domain? (arXiv 2509.00859).

FOUND (abstract) and INFERRED parts of the rule are those of `flatlab.specs.run.FREEZING`. Ablations: the memory K, the
threshold, what is frozen, and the direction.
"""

from analyses._qat import FQAT, GAQAT, Comparison

READING = (
    "FQAT (our reading of arXiv 2509.00859). Found in its abstract: layers are frozen, decided at each training step, "
    "by a disorder that identifies unstable ones. Inferred: a mean of the disorder of decay 1 - 1/K, K as 6 % of the "
    "steps, the threshold 0.45, that high disorder is unstable, that step sizes are frozen and not weights. No "
    "published number of it could be read, so that none is shown."
)
COMPARISON = Comparison(
    own=FQAT,
    baseline="ERM",
    further=((FQAT, "LSQ"), (FQAT, "LSQ+SAGM"), (FQAT, GAQAT)),
    ablations={
        "K 2 % of the steps": {"freeze_share": 0.02},
        "K 20 % of the steps": {"freeze_share": 0.2},
        "threshold 0.4": {"freeze_threshold": 0.4},
        "threshold 0.5": {"freeze_threshold": 0.5},
        "whole layers": {"freeze_what": "layer"},
        "low disorder, below 0.45": {"freeze_direction": "low"},
    },
    reading=READING,
)
FIGURE = COMPARISON.figure(__name__, __doc__)
