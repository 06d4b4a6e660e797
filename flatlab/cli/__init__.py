"""The command line: `flatlab.cli.main`."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from flatlab.cli import overview

COMPLETING = "_FLATLAB_COMPLETE"  # set by a shell that asks for completions, without arguments
HELP: tuple[list[str], ...] = ([], ["-h"], ["--help"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        arguments: the process's own by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in HELP and COMPLETING not in os.environ:
        with suppress(OSError):  # a closed pipe, a full disk: told below, as for any command
            print(overview.page(), flush=True)
            sys.exit(0)
        words = ["--help"]
    from flatlab.cli.app import run

    sys.exit(run(words))
