"""Table 9: accuracy on source and held-out domains from eight bits a weight to five (QT-DoG, Table 9).

The runs differ only in the number of bits: they share split, initialisation, batches, and the state at the switch.
On the source domains it is that of the test split, if the runs have one.
"""

from analyses._accuracy_table import PaperTable, bit_widths

BITS = (8, 7, 6, 5)
TABLE = PaperTable(
    number="9",
    lines=bit_widths(BITS),
    columns={
        "PACS": {"source": "PACS_in", "target": "PACS_out"},
        "TerraIncognita": {"source": "TerraIncognita_in", "target": "TerraIncognita_out"},
    },
)
FIGURE = TABLE.figure(__name__, __doc__)
