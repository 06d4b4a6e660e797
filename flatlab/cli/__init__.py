"""The command line: `flatlab.cli.main`."""

from flatlab.cli.app import main

__all__ = ["main"]
