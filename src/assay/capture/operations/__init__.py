"""One short file per kind of operation: how a weight's per-sample gradients are read from its output's gradient."""

from assay.capture.call import GENERAL
from assay.capture.operations import convolution, elementwise, embedding, linear, norm, recurrent
from assay.capture.operations.composite import open_composite
from assay.capture.operations.general import general_rule

__all__ = ["convolution", "elementwise", "embedding", "linear", "norm", "recurrent"]

GENERAL.extend((open_composite, general_rule))
