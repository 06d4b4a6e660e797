"""Figure 6: where ERM and QT-DoG find evidence for the true class, three images of each held-out domain (GradCAM).

PACS in the paper, one row a domain, in its order.
"""

from analyses import _gradcam_figure
from analyses._gradcam_figure import CamFigure

FIGURE = CamFigure("6", "pairs", targets={"art_painting": 0, "cartoon": 1, "sketch": 2, "photo": 3})

BASELINE, SUMMARY = _gradcam_figure.BASELINE, _gradcam_figure.SUMMARY
labelled, plan, table, arrays = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.arrays
caption, draw = FIGURE.caption, FIGURE.draw
findings, summary, remarks = _gradcam_figure.findings, _gradcam_figure.summary, _gradcam_figure.remarks
