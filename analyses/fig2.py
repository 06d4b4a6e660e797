"""Figure 2: weights, quantization noise and its symmetry in one layer of a quantized network (QT-DoG, section 3.2).

The layer is that of a weight drawn by lot. The three lines are three ways to pool its noise: in steps of the channel,
raw, and for one step size in the whole layer; raw noise of channels with steps of their own is a mixture.
"""

from analyses._noise_figure import NoiseFigure

FIGURE = NoiseFigure("2", layers=1, modes=("normalised", "raw", "tensor")).figure(__name__, __doc__)
