"""Table 12: test accuracy on the source domains of the flat-minima methods, on images kept for it (QT-DoG, Table 12).

Each domain is split 60/20/20. Accuracies on the held-out domain are also shown.
"""

from analyses._accuracy_table import Line, PaperTable

METHODS = ("ERM", "SAM", "SWA", "SMA", "SWAD", "QT-DoG")
TABLE = PaperTable(
    number="12",
    lines=tuple(Line(name, name, {"test_share": 0.2}, {"method": name}) for name in METHODS),
    columns={name: {"source": name, "target": ""} for name in ("PACS", "TerraIncognita")},
    split="test",
)
FIGURE = TABLE.figure(__name__, __doc__)
