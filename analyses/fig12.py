"""Figure 12: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 100 held out."""

from analyses._gradcam_figure import CamFigure

CAMS = CamFigure("12", "triples", targets={"location_100": 0}, shown=6)
FIGURE = CAMS.figure(__name__, __doc__)
