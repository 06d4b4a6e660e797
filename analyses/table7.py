"""Table 7: accuracy on each held-out domain of PACS (QT-DoG, Table 7).

On other data only the printed means are shown. The members of an ensemble use the seeds, so that it has no interval.
"""

from analyses._accuracy_table import domains_table

TABLE = domains_table("7", "PACS")
FIGURE = TABLE.figure(__name__, __doc__)
