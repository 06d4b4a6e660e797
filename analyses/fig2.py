"""Figure 2: weights, quantization noise and its symmetry in one layer of a quantized network (QT-DoG, section 3.2).

The layer is that of a random weight. The three lines pool its noise in three ways: in steps of the channel, raw, and
for one step size in the whole layer; raw noise of channels with different steps is a mixture.
"""

from analyses._noise_figure import NoiseFigure

FIGURE = NoiseFigure("2", layers=1, modes=("normalised", "raw", "tensor")).figure(__name__, __doc__)
