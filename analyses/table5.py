"""Table 5: accuracy on the held-out domain with a vision transformer (QT-DoG, Table 5).

The paper's network is a pretrained DeiT-Small. On digits stands in digits-vit, a patch transformer from scratch; on
photographs torchvision's vit_b_16. AdamW without weight decay, as in SDViT's code.
"""

from analyses._accuracy_table import Line, PaperTable

ADAMW = {"optimizer": "adamw"}
TABLE = PaperTable(
    number="5",
    lines=(
        Line("ERM", "ERM", printed={"algorithm": "ERM_ViT"}),
        Line("QT-DoG", "QT-DoG", printed={"algorithm": "ERM_ViT + QT-DoG"}),
    ),
    columns={name: {"target": name} for name in ("PACS", "TerraIncognita")},
    theirs="pretrained DeiT-Small",
    networks={"digits": {"model": "digits-vit", **ADAMW}, "": {"model": "vit_b_16", **ADAMW}},
)
FIGURE = TABLE.figure(__name__, __doc__)
