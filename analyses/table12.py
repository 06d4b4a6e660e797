"""Table 12: in-domain test accuracy of the flat-minima methods, on images kept for it (QT-DoG, Table 12).

Each domain is split 60/20/20: its runs are not those of the other tables. Out-of-domain accuracies stand beside.
"""

from analyses import _accuracy_table
from analyses._accuracy_table import Line, PaperTable

METHODS = ("ERM", "SAM", "SWA", "SMA", "SWAD", "QT-DoG")
TABLE = PaperTable(
    number="12",
    lines=tuple(Line(name, name, {"test_share": 0.2}, {"method": name}) for name in METHODS),
    columns={"PACS": {"test": "PACS", "out": ""}, "TerraIncognita": {"test": "TerraIncognita", "out": ""}},
)

SUMMARY, BASELINE = _accuracy_table.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
as_published = TABLE.as_published
