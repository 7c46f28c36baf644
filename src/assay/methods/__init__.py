"""One file, one paper: what is made of the captured per-sample gradients."""

from assay.methods.embedding import DataValueEmbedding
from assay.methods.in_run import InRunShapley
from assay.methods.norms import GradientNorms

__all__ = ["DataValueEmbedding", "GradientNorms", "InRunShapley"]
