"""What autograd knows of a sample: probes on every use of a parameter, with one rule per operation."""

from assay.capture.coverage import Coverage
from assay.capture.mode import Capture, Weights, contract

__all__ = ["Capture", "Coverage", "Weights", "contract"]
