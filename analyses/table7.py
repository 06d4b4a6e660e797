"""Table 7: accuracy on each held-out domain of PACS (QT-DoG, Table 7).

On other data the printed means alone stand beside ours. An ensemble takes up the seeds, so that it has no interval.
"""

from analyses._accuracy_table import domains_table

TABLE = domains_table("7", "PACS")
FIGURE = TABLE.figure(__name__, __doc__)
