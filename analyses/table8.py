"""Table 8: accuracy on each held-out domain of TerraIncognita (QT-DoG, Table 8).

On other data only the printed means are shown. The members of an ensemble use the seeds, so that it has no interval.
"""

from analyses._accuracy_table import domains_table

TABLE = domains_table("8", "TerraIncognita")
FIGURE = TABLE.figure(__name__, __doc__)
