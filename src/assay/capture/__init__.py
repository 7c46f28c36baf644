"""What autograd knows of a sample: probes on every use of a parameter, with one rule per operation."""

from assay.capture import operations as operations  # registers the rules
from assay.capture.coverage import Coverage
from assay.capture.mode import Capture
from assay.capture.products import contract
from assay.capture.weights import Weights, constants_of

__all__ = ["Capture", "Coverage", "Weights", "constants_of", "contract"]
