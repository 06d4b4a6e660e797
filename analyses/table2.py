"""Table 2: QT-DoG on top of CORAL and of MixStyle, at 7 bits (QT-DoG, Table 2)."""

from analyses._accuracy_table import Line, PaperTable

LINES = {"CORAL": "CORAL", "CORAL + QT-DoG": "CORAL+QT-DoG", "MixStyle": "MixStyle"}
LINES |= {"MixStyle + QT-DoG": "MixStyle+QT-DoG"}
TABLE = PaperTable(
    number="2",
    lines=tuple(Line(label, method, printed={"algorithm": label}) for label, method in LINES.items()),
    columns={"PACS": {"target": "PACS"}, "TerraIncognita": {"target": "TerraIncognita"}},
)
FIGURE = TABLE.figure(__name__, __doc__)
