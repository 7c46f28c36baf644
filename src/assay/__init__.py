"""What was each training example worth to the model that was trained on it?"""

from assay.errors import (
    AssayError,
    AssayWarning,
    CoverageError,
    InputError,
    StoreError,
    UnsupportedOptimizerError,
)
from assay.methods import InRunShapley
from assay.run import Run, RunStatus
from assay.store import Ledger
from assay.store import open_ledger as open  # noqa: A004  (assay.open reads as what it does)
from assay.targets import Target

__version__ = "0.1.0"
__all__ = [
    "AssayError",
    "AssayWarning",
    "CoverageError",
    "InRunShapley",
    "InputError",
    "Ledger",
    "Run",
    "RunStatus",
    "StoreError",
    "Target",
    "UnsupportedOptimizerError",
    "open",
]
