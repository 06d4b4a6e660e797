"""Table 9: accuracy in and out of domain from eight bits a weight to five (QT-DoG, Table 9).

The runs differ in the number of bits alone: they share split, initialisation, batches, and the state at the switch.
In domain means the source domains' held-back images, which also select the checkpoint.
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
        "PACS": {"in": "PACS_in", "out": "PACS_out"},
        "TerraIncognita": {"in": "TerraIncognita_in", "out": "TerraIncognita_out"},
    },
)

SUMMARY, BASELINE = _accuracy_table.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
as_published = TABLE.as_published
