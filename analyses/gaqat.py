"""GAQAT (our reading): quantization from the first step, step sizes and sharpness (arXiv 2412.05551).

FOUND (abstract), REVIEW (public reviews) and INFERRED parts of the rule are those of `flatlab.specs.run.FreezeSpec`.
Ablations: K, the threshold, freezing without release, and the reviewers' baseline of gradients that alternate.
"""

import pandas as pd

from analyses._qat import GAQAT, Comparison

PUBLISHED = pd.DataFrame(
    [
        ("PACS, 3 and 4 bits", "GAQAT less LSQ+SAGM", "up to 4.5", "found: abstract"),
        ("PACS, 4 bits", "GAQAT less LSQ", "below 2", "public review"),
        ("PACS, 4 bits", "LSQ+SAGM less LSQ", "-2.5 or lower", "arithmetic, if the 4.5 is at 4 bits"),
        ("DomainNet, 4 bits", "GAQAT less the QAT baseline", "1.39", "found: abstract"),
        ("DomainNet, 3 bits", "GAQAT less the QAT baseline", "1.06", "found: abstract"),
    ],
    columns=["data", "difference", "points", "source"],
)
READING = (
    "GAQAT (our reading of arXiv 2412.05551). Found in its abstract: task and perturbed loss give step sizes "
    "conflicting gradients; a disorder of gradients decides which are frozen. From public reviews: the disorder of the "
    "task gradient, every K steps, below a threshold, freezes the task gradient until the next decision. Inferred: K "
    "as 6 % of the steps, the threshold 0.3, one decision for a whole tensor of step sizes, and all other options. "
    "The published differences get no verdict here, whatever the data, since the paper's protocol could not be read."
)
COMPARISON = Comparison(
    own=GAQAT,
    baseline="LSQ",
    further=((GAQAT, "LSQ+SAGM"),),
    ablations={
        "K 2 % of the steps": {"freeze_share": 0.02},
        "K 20 % of the steps": {"freeze_share": 0.2},
        "threshold 0.2": {"freeze_threshold": 0.2},
        "threshold 0.4": {"freeze_threshold": 0.4},
        "never released": {"freeze_forever": True},
        "alternating gradients": {"freeze_alternate": True},
    },
    reading=READING,
    published=lambda: PUBLISHED,
)
FIGURE = COMPARISON.figure(__name__, __doc__)
