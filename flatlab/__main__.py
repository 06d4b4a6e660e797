"""`python -m flatlab` is the command line."""

from flatlab.cli.app import main

main()
