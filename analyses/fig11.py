"""Figure 11: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 43 unseen."""

from flatlab import saliency
from flatlab.saliency import CamFigure

FIGURE = CamFigure("11", "triples", targets={"location_43": 2}, shown=6)

BASELINE, SUMMARY = saliency.BASELINE, saliency.SUMMARY
labelled, plan, table, caption, draw = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.caption, FIGURE.draw
findings, summary, remarks = saliency.findings, saliency.summary, saliency.remarks
