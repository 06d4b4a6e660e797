"""Figure 11: GradCAM of ERM and QT-DoG beside the original, TerraIncognita's location 43 held out."""

from analyses._gradcam_figure import CamFigure

CAMS = CamFigure("11", "triples", targets={"location_43": 2}, shown=6)
FIGURE = CAMS.figure(__name__, __doc__)
