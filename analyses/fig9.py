"""Figure 9: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 38 held out."""

from analyses._gradcam_figure import CamFigure

CAMS = CamFigure("9", "triples", targets={"location_38": 1}, shown=6)
FIGURE = CAMS.figure(__name__, __doc__)
