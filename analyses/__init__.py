"""One module for each figure and table of QT-DoG (arXiv 2410.06020): `plan`, `table`, `draw` and a docstring."""
