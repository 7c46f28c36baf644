"""What lies beside the repository, in `../shared/data`, and not in it: a clone alone does not have it."""

from __future__ import annotations

from pathlib import Path

import pytest

__all__ = ["needs_data"]

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the experiments' data lies beside the repository")
