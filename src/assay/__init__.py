"""What was each training example worth to the model that was trained on it?"""

from typing import TYPE_CHECKING, Any

from assay.errors import (
    AssayError,
    AssayWarning,
    CoverageError,
    InputError,
    StoreError,
    UnsupportedOptimizerError,
)

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

_HOMES = {
    "index": ("Index", "average_influence"),
    "methods": ("DataValueEmbedding", "GradientNorms", "InRunShapley"),
    "projection": ("Projection",),
    "run": ("Run", "RunStatus"),
    "store": ("Ledger",),
    "targets": ("Target",),
}
"""Where everything else is, which is imported at the first use: torch takes seconds, and Ctrl-C may come before it."""

if TYPE_CHECKING:
    from assay.index import Index, average_influence
    from assay.methods import DataValueEmbedding, GradientNorms, InRunShapley
    from assay.projection import Projection
    from assay.run import Run, RunStatus
    from assay.store import Ledger
    from assay.store import open_ledger as open
    from assay.targets import Target
else:

    def __getattr__(name: str) -> Any:
        """Import the whole interface, of which this is a name, or one of the package's rooms."""
        from importlib import import_module
        from importlib.util import find_spec

        if name not in __all__ and (name.startswith("_") or find_spec(f"assay.{name}") is None):
            raise AttributeError(f"module 'assay' has no attribute {name!r}")
        for home, names in _HOMES.items():
            module = import_module(f"assay.{home}")
            globals().update({own: getattr(module, own) for own in names})
        globals()["open"] = import_module("assay.store").open_ledger
        return globals()[name] if name in globals() else import_module(f"assay.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
