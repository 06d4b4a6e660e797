"""Figure 7: more GradCAM of ERM and QT-DoG, the three images of each held-out domain after those of Figure 6."""

from analyses._gradcam_figure import CamFigure

CAMS = CamFigure("7", "pairs", targets={"art_painting": 0, "cartoon": 1, "sketch": 2, "photo": 3}, first=3)
FIGURE = CAMS.figure(__name__, __doc__)
