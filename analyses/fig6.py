"""Figure 6: where ERM and QT-DoG find evidence for the true class, three images of each unseen domain (GradCAM).

PACS in the paper, one row a domain, in its order.
"""

from flatlab import saliency
from flatlab.saliency import CamFigure

FIGURE = CamFigure("6", "pairs", targets={"art_painting": 0, "cartoon": 1, "sketch": 2, "photo": 3})

BASELINE, SUMMARY = saliency.BASELINE, saliency.SUMMARY
labelled, plan, table, caption, draw = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.caption, FIGURE.draw
findings, summary, remarks = saliency.findings, saliency.summary, saliency.remarks
