"""Table 9: accuracy on source and held-out domains from eight bits a weight to five (QT-DoG, Table 9).

The runs differ in the number of bits alone: they share split, initialisation, batches, and the state at the switch.
On the source domains it is that of the test split, where the runs keep one.
"""

from analyses import _accuracy_table
from analyses._accuracy_table import Line, PaperTable

BITS = (8, 7, 6, 5)
TABLE = PaperTable(
    number="9",
    lines=(
        Line("ERM", "ERM", printed={"bits": 32}),
        *(Line(f"{bits} bit", "QT-DoG", {"bits": bits}, {"bits": bits}) for bits in BITS),
    ),
    columns={
        "PACS": {"source": "PACS_in", "target": "PACS_out"},
        "TerraIncognita": {"source": "TerraIncognita_in", "target": "TerraIncognita_out"},
    },
)

SUMMARY, BASELINE = _accuracy_table.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
as_published = TABLE.as_published
