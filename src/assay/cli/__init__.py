"""The command line: ``assay demo``, ``assay train``, ``assay report``, ``assay bench``."""

from assay.cli.app import app, main

__all__ = ["app", "main"]
