"""Figure 7: more GradCAM of ERM and QT-DoG, the three images of each held-out domain after those of Figure 6."""

from analyses import _gradcam_figure
from analyses._gradcam_figure import CamFigure

FIGURE = CamFigure("7", "pairs", targets={"art_painting": 0, "cartoon": 1, "sketch": 2, "photo": 3}, first=3)

BASELINE, SUMMARY = _gradcam_figure.BASELINE, _gradcam_figure.SUMMARY
labelled, plan, table, arrays = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.arrays
caption, draw = FIGURE.caption, FIGURE.draw
findings, summary, remarks = _gradcam_figure.findings, _gradcam_figure.summary, _gradcam_figure.remarks
