"""Figure 10: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 46 held out."""

from analyses._gradcam_figure import CamFigure

CAMS = CamFigure("10", "triples", targets={"location_46": 3}, shown=6)
FIGURE = CAMS.figure(__name__, __doc__)
