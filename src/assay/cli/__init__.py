"""The command line: ``assay demo``, ``assay train``, ``assay report``, ``assay bench``."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, as `assay.cli.app.main`; Ctrl-C ends it in silence while it is still being imported.

    Args:
        arguments: in place of those of the process.
    """
    try:
        from assay.cli.app import main as run

        run(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
