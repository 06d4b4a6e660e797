"""Table 14: quantization from an early or a late step on, at 7 bits (QT-DoG, Table 14).

The paper's steps 1,000 to 4,000 of 5,000 are shares of the schedule here: 20, 40, 60 and 80 %.
"""

from collections.abc import Mapping

from flatlab import papertable
from flatlab.papertable import Line, PaperTable
from flatlab.settings import PAPER, Setting

STEPS = (1000, 2000, 3000, 4000)  # the paper's


def share(step: int, setting: Setting) -> Mapping[str, int]:
    """Return the switch at the share of the schedule that a step is of the paper's."""
    return {"switch": round(step / PAPER.steps * setting.steps)}


TABLE = PaperTable(
    number="14",
    lines=(
        Line("no quantization", "ERM", printed={"step": None}),
        *(
            Line(
                f"from {100 * step // PAPER.steps} %",
                "QT-DoG",
                lambda setting, step=step: share(step, setting),
                printed={"step": step},
            )
            for step in STEPS
        ),
    ),
    columns={"PACS": {"out": "PACS_out"}},
)

SUMMARY, BASELINE = papertable.SUMMARY, TABLE.baseline
labelled, plan, table, sheet, caption = TABLE.labelled, TABLE.plan, TABLE.table, TABLE.sheet, TABLE.caption
findings, summary, remarks, draw = TABLE.findings, TABLE.summary, TABLE.remarks, TABLE.draw
