"""Acting on values: which samples to keep, and what each source is owed."""

from assay.acting.credit import Credit, credit
from assay.acting.select import Selection, select

__all__ = ["Credit", "Selection", "credit", "select"]
