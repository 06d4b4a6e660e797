"""Curvature of the digits CNN, side by side in one run: products, top-10 eigenvalues, trace.

    python benchmarks/curvature.py [--samples 256] [--seeds 3]

Counts of products do not depend on the machine; seconds do, so read their ratios.
"""

from flatlab.data.digits import load_digits_domains  # noqa: F401
