"""Table 8: accuracy on each held-out domain of TerraIncognita (QT-DoG, Table 8).

On other data the printed means alone stand beside ours. An ensemble takes up the seeds, so that it has no interval.
"""

from analyses._accuracy_table import domains_table

TABLE = domains_table("8", "TerraIncognita")
FIGURE = TABLE.figure(__name__, __doc__)
