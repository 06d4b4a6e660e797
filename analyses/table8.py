"""Table 8: accuracy on each held-out domain of TerraIncognita (QT-DoG, Table 8).

On other data the printed means alone stand beside ours. An ensemble takes up the seeds, so that it has no interval.
"""

from analyses import _accuracy_table
from analyses._accuracy_table import Line, PaperTable

TABLE = PaperTable(
    number="8",
    lines=(
        Line("ERM", "ERM", printed={"algorithm": "ERM (our runs)"}),
        Line("SWAD", "SWAD", printed={"algorithm": "SWAD"}),
        Line("EoA", "EoA", printed={"algorithm": "EoA"}),
        Line("QT-DoG", "QT-DoG", printed={"algorithm": "QT-DoG"}),
        Line("EoQ", "EoQ", printed={"algorithm": "EoQ"}),
    ),
    columns={"TerraIncognita": {"target": "Avg"}},
    domains=True,
)

SUMMARY, BASELINE = _accuracy_table.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
as_published = TABLE.as_published
