"""What was each training example worth to the model that was trained on it?"""

from assay.errors import (
    AssayError,
    AssayWarning,
    CoverageError,
    InputError,
    StoreError,
    UnsupportedOptimizerError,
)
from assay.index import Index, average_influence
from assay.methods import DataValueEmbedding, GradientNorms, InRunShapley
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
    "DataValueEmbedding",
    "GradientNorms",
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
    "average_influence",
    "open",
]
