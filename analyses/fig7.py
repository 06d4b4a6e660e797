"""Figure 7: more GradCAM of ERM and QT-DoG, the three images of each unseen domain after those of Figure 6."""

from flatlab import saliency
from flatlab.saliency import CamFigure

FIGURE = CamFigure("7", "pairs", targets={"art_painting": 0, "cartoon": 1, "sketch": 2, "photo": 3}, first=3)

BASELINE, SUMMARY = saliency.BASELINE, saliency.SUMMARY
labelled, plan, table, caption, draw = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.caption, FIGURE.draw
findings, summary, remarks = saliency.findings, saliency.summary, saliency.remarks
