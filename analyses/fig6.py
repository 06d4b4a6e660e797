"""Figure 6: where ERM and QT-DoG find evidence for the true class, three images of each held-out domain (GradCAM).

PACS in the paper, one row a domain, in its order.
"""

from analyses._gradcam_figure import CamFigure

CAMS = CamFigure("6", "pairs", targets={"art_painting": 0, "cartoon": 1, "sketch": 2, "photo": 3})
FIGURE = CAMS.figure(__name__, __doc__)
