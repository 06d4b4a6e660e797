"""Table 4: quantization algorithms at 7 bits, trained and not, on source and held-out domains (QT-DoG, Table 4).

OBC and round-to-nearest start from ERM's checkpoint without training; INQ and LSQ continue training from the switch on.
Round-to-nearest is ours: the paper does not print it.
"""

from dataclasses import replace

import pandas as pd

from analyses._accuracy_table import Line, PaperTable
from flatlab.specs.settings import Setting
from flatlab.store.runs import RunStore

POST = "OBC"
ERRORS = ["error", "error_nearest", "rows", "rows_worse"]  # logged by OBC for each layer
TABLE = PaperTable(
    number="4",
    lines=(
        Line("no quantization", "ERM", printed={"algorithm": "No quant"}),
        Line("round to nearest", "RTN"),
        Line(POST, "OBC", printed={"algorithm": "OBC"}),
        Line("INQ", "INQ", printed={"algorithm": "INQ"}),
        Line("LSQ", "QT-DoG", printed={"algorithm": "LSQ"}),
    ),
    columns={"PACS": {"source": "in_domain", "target": "out_domain"}},
)


def table(store: RunStore, setting: Setting) -> pd.DataFrame:
    """Return the accuracies; for OBC also its layers' errors, and the number of rows worse than by rounding."""
    frame = TABLE.table(store, setting)
    for label, run in TABLE.labelled(setting):
        if label == POST:
            same = (frame["method"] == label) & (frame["dataset"] == run.dataset) & (frame["over"] == "run")
            same &= (frame["held_out"] == run.held_out) & (frame["seed"] == run.seed)
            layers = pd.DataFrame(list(next(iter(store.run(run).rows()))["layers"].values()))
            for name in ERRORS:
                frame.loc[same, name] = float(layers[name].sum())
    return frame


def remarks(frame: pd.DataFrame) -> list[str]:
    """Return the sentences of the table, and one on the layer errors of OBC and of rounding."""
    mine = frame[(frame["method"] == POST) & (frame["over"] == "run")].drop_duplicates(["dataset", "held_out", "seed"])
    ratio, worse = mine["error"] / mine["error_nearest"], mine["rows_worse"].sum() / mine["rows"].sum()
    return [
        *TABLE.remarks(frame),
        f"OBC's layer errors on its calibration images are {ratio.median():.2f} of those of rounding to the nearest "
        f"level ({ratio.min():.2f} to {ratio.max():.2f} over runs); {worse:.1%} of the rows "
        f"({mine['rows_worse'].sum():.0f} of {mine['rows'].sum():.0f}) have a larger one.",
    ]


FIGURE = replace(TABLE.figure(__name__, __doc__), table=table, remarks=remarks)
