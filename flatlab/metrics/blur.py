"""A density from weighted nodes, each blurred to a Gaussian. Torch-free, so that stored spectra can be drawn."""

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def blur(places: FloatArray, nodes: FloatArray, weights: FloatArray, *, sigma: float) -> FloatArray:
    """Return sum_i w_i N(x; node_i, sigma^2) at places x (G,) from nodes and weights (m,)."""
    kernel = np.exp(-0.5 * ((places[:, None] - nodes) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return np.asarray(kernel @ weights)
