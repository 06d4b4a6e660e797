"""Figure 8: weights, quantization noise and its symmetry in four layers of a quantized network (QT-DoG, App. L).

The paper does not name its layers; here they are spread evenly over the network.
"""

from analyses._noise_figure import NoiseFigure

FIGURE = NoiseFigure("8", layers=4, modes=("normalised",)).figure(__name__, __doc__)
