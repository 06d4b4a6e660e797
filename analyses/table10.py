"""Table 10: accuracy on the held-out domain down to two bits a weight (QT-DoG, Table 10).

The runs differ only in the number of bits: they share split, initialisation, batches, and the state at the switch.
"""

from analyses._accuracy_table import PaperTable, bit_widths

BITS = (7, 6, 5, 4, 3, 2)
TABLE = PaperTable(
    number="10",
    lines=bit_widths(BITS),
    columns={"PACS": {"target": "PACS_out"}},
)
FIGURE = TABLE.figure(__name__, __doc__)
