"""Figure 10: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 46 held out."""

from analyses import _gradcam_figure
from analyses._gradcam_figure import CamFigure

FIGURE = CamFigure("10", "triples", targets={"location_46": 3}, shown=6)

BASELINE, SUMMARY = _gradcam_figure.BASELINE, _gradcam_figure.SUMMARY
labelled, plan, table, arrays = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.arrays
caption, draw = FIGURE.caption, FIGURE.draw
findings, summary, remarks = _gradcam_figure.findings, _gradcam_figure.summary, _gradcam_figure.remarks
