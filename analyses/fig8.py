"""Figure 8: weights, quantization noise and its symmetry in four layers of a quantized network (QT-DoG, App. L).

The paper does not name its layers; here they are evenly spread over the network, or all where it has no more.
"""

from analyses import _noise_figure
from analyses._noise_figure import NoiseFigure

FIGURE = NoiseFigure("8", layers=4, modes=("normalised",))

SUMMARY, BASELINE = _noise_figure.SUMMARY, _noise_figure.BASELINE
labelled, plan, table, arrays = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.arrays
caption, draw = FIGURE.caption, FIGURE.draw
findings, summary, remarks = FIGURE.findings, FIGURE.summary, FIGURE.remarks
