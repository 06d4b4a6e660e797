"""Figure 12: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 100 unseen."""

from flatlab import saliency
from flatlab.saliency import CamFigure

FIGURE = CamFigure("12", "triples", targets={"location_100": 0}, shown=6)

BASELINE, SUMMARY = saliency.BASELINE, saliency.SUMMARY
labelled, plan, table, caption, draw = FIGURE.labelled, FIGURE.plan, FIGURE.table, FIGURE.caption, FIGURE.draw
findings, summary, remarks = saliency.findings, saliency.summary, saliency.remarks
