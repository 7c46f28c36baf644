"""What was each training example worth to the model that was trained on it?"""

from assay.errors import (
    AssayError,
    AssayWarning,
    CoverageError,
    InputError,
    StoreError,
    UnsupportedOptimizerError,
)
from assay.index import Index
from assay.methods import InRunShapley
from assay.projection import Projection
from assay.run import Run, RunStatus
from assay.store import Ledger
from assay.store import open_ledger as open
from assay.targets import Target

__version__ = "0.1.0"
__all__ = [
    "AssayError",
    "AssayWarning",
    "CoverageError",
    "InRunShapley",
    "Index",
    "InputError",
    "Ledger",
    "Projection",
    "Run",
    "RunStatus",
    "StoreError",
    "Target",
    "UnsupportedOptimizerError",
    "open",
]
