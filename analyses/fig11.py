"""Figure 11: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 43 held out."""

from analyses import _gradcam_figure
from analyses._gradcam_figure import CamFigure

FIGURE = CamFigure("11", "triples", targets={"location_43": 2}, shown=6)

BASELINE, SUMMARY = _gradcam_figure.BASELINE, _gradcam_figure.SUMMARY
labelled, plan, table, arrays = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.arrays
caption, draw = FIGURE.caption, FIGURE.draw
findings, summary, remarks = _gradcam_figure.findings, _gradcam_figure.summary, _gradcam_figure.remarks
