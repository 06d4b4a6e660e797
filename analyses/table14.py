"""Table 14: quantization from an early or a late step on, at 7 bits (QT-DoG, Table 14).

The paper's steps 1,000 to 4,000 of 5,000 are shares of the schedule here.
"""

from analyses._accuracy_table import Line, PaperTable
from flatlab.specs.settings import PAPER

STEPS = (1000, 2000, 3000, 4000)  # the paper's


def line(step: int) -> Line:
    """Return the line of a switch at a step of the paper's schedule."""
    share = step / PAPER.steps
    return Line(f"from {share:.0%}", "QT-DoG", {"switch": None, "switch_share": share}, {"step": step})


TABLE = PaperTable(
    number="14",
    lines=(Line("no quantization", "ERM", printed={"step": None}), *map(line, STEPS)),
    columns={"PACS": {"target": "PACS_out"}},
)
FIGURE = TABLE.figure(__name__, __doc__)
