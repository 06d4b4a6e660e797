"""Table 10: accuracy on the held-out domain down to two bits a weight (QT-DoG, Table 10).

The runs differ in the number of bits alone: they share split, initialisation, batches, and the state at the switch.
"""

from analyses import _accuracy_table
from analyses._accuracy_table import Line, PaperTable

BITS = (7, 6, 5, 4, 3, 2)
TABLE = PaperTable(
    number="10",
    lines=(
        Line("ERM", "ERM", printed={"bits": 32}),
        *(Line(f"{bits} bit", "QT-DoG", {"bits": bits}, {"bits": bits}) for bits in BITS),
    ),
    columns={"PACS": {"target": "PACS_out"}},
)

SUMMARY, BASELINE = _accuracy_table.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
as_published = TABLE.as_published
