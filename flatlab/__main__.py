"""`python -m flatlab` is the command line."""

from flatlab.cli import main

main()
