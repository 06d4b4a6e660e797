"""Table 4: quantization algorithms at 7 bits, trained and not, in and out of domain (QT-DoG, Table 4).

OBC and round-to-nearest start from ERM's checkpoint and train nothing; INQ and LSQ go on training from the switch on.
Round-to-nearest is ours: the paper does not print it.
"""

from flatlab import papertable
from flatlab.papertable import Line, PaperTable

TABLE = PaperTable(
    number="4",
    lines=(
        Line("no quantization", "ERM", printed={"algorithm": "No quant"}),
        Line("round to nearest", "RTN"),
        Line("OBC", "OBC", printed={"algorithm": "OBC"}),
        Line("INQ", "INQ", printed={"algorithm": "INQ"}),
        Line("LSQ", "QT-DoG", printed={"algorithm": "LSQ"}),
    ),
    columns={"PACS": {"in": "in_domain", "out": "out_domain"}},
)

SUMMARY, BASELINE = papertable.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
