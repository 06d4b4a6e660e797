"""Table 15: uniform noise on the weights instead of quantization, kept or not (QT-DoG, Table 15).

The paper does not state when the noise is added, nor whether it is kept. Here it is added at each step from the switch
on; the printed numbers are compared with the noise that is kept, since a single draw of theirs is too small to matter.
Half-widths are the paper's as multiples of its learning rate, so that noise has the same ratio to a step of Adam.
"""

from analyses._accuracy_table import Line, PaperTable
from flatlab.specs.settings import PAPER

WIDTHS = (5e-6, 1e-5, 5e-5, 1e-4)  # the paper's


def line(width: float, method: str, word: str) -> Line:
    """Return the line of a half-width; only noise that is kept is compared with the paper's."""
    multiple = round(width / PAPER.lr, 6)
    printed = {"half_width": width} if method == "noise-kept" else {}
    return Line(f"{multiple:g} lr, {word}", method, {"noise_lr": multiple}, printed)


TABLE = PaperTable(
    number="15",
    lines=(
        Line("no noise", "ERM", printed={"half_width": 0.0}),
        *(line(width, "noise-kept", "kept") for width in WIDTHS),
        *(line(width, "noise", "not kept") for width in WIDTHS),
    ),
    columns={"PACS": {"target": "PACS_out"}},
)
FIGURE = TABLE.figure(__name__, __doc__)
