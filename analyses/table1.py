"""Table 1: accuracy on the held-out domain on each data set, of one model and of ensembles (QT-DoG, Table 1).

`--datasets PACS,VLCS,...` uses those given, and their mean, which is compared with the printed one only for all five.
SAM and SMA are ours: the paper does not print them here. The members of an ensemble use the seeds, so that it has no
interval.
"""

from analyses._accuracy_table import Line, PaperTable

SINGLE = ("ERM", "SAM", "SMA", "CORAL", "MixStyle", "SWAD", "QT-DoG")
ENSEMBLES = {"ERM Ens.": "ERM-ensemble", "EoA": "EoA", "EoQ": "EoQ"}
TABLE = PaperTable(
    number="1",
    lines=tuple(Line(name, name, printed={"algorithm": name}) for name in SINGLE)
    + tuple(Line(name, method, printed={"algorithm": name}) for name, method in ENSEMBLES.items()),
    columns={name: {"target": name} for name in ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet")},
    average="Avg",
)
FIGURE = TABLE.figure(__name__, __doc__)
