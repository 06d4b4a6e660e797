"""Figure 8: weights, quantization noise and its symmetry in four layers of a quantized network (QT-DoG, App. L).

The paper does not name its layers; here they are evenly spread over the network, or all where it has no more.
"""

from flatlab import noisefigure
from flatlab.noisefigure import NoiseFigure

FIGURE = NoiseFigure("8", layers=4, modes=("normalised",))

SUMMARY, BASELINE = noisefigure.SUMMARY, noisefigure.BASELINE
labelled, plan, table, caption = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.caption
findings, summary, remarks, draw = FIGURE.findings, FIGURE.summary, FIGURE.remarks, FIGURE.draw
