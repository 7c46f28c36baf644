"""One file, one paper: what is made of the captured per-sample gradients."""

from assay.methods.in_run import InRunShapley

__all__ = ["InRunShapley"]
