"""Table 2: QT-DoG on top of CORAL and of MixStyle, at 7 bits (QT-DoG, Table 2)."""

from analyses import _accuracy_table
from analyses._accuracy_table import Line, PaperTable

LINES = {"CORAL": "CORAL", "CORAL + QT-DoG": "CORAL+QT-DoG", "MixStyle": "MixStyle"}
LINES |= {"MixStyle + QT-DoG": "MixStyle+QT-DoG"}
TABLE = PaperTable(
    number="2",
    lines=tuple(Line(label, method, printed={"algorithm": label}) for label, method in LINES.items()),
    columns={"PACS": {"target": "PACS"}, "TerraIncognita": {"target": "TerraIncognita"}},
)

SUMMARY, BASELINE = _accuracy_table.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
as_published = TABLE.as_published
