"""Table 11: accuracy on the held-out domain with a ResNeXt-50, of one model and of ensembles (QT-DoG, Table 11).

The paper's network was pretrained on a billion images. On digits stands in digits-resnext, a residual network of
grouped convolutions from scratch; on photographs torchvision's resnext50_32x4d (`--weights FILE` for the paper's).
"""

from analyses._accuracy_table import Line, PaperTable

SINGLE = ("ERM", "SMA", "QT-DoG")
ENSEMBLES = {"ERM Ens.": "ERM-ensemble", "EoA": "EoA", "EoQ": "EoQ"}
TABLE = PaperTable(
    number="11",
    lines=tuple(Line(name, name, printed={"algorithm": name}) for name in SINGLE)
    + tuple(Line(name, method, printed={"algorithm": name}) for name, method in ENSEMBLES.items()),
    columns={name: {"target": name} for name in ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet")},
    average="Avg",
    theirs="ResNeXt-50 of a billion images",
    networks={"digits": {"model": "digits-resnext"}, "": {"model": "resnext50_32x4d"}},
)
FIGURE = TABLE.figure(__name__, __doc__)
