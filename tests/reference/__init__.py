"""The slow and obvious answers that assay is compared with, computed without assay."""

from reference.cases import CASES, Case, Loss
from reference.dense import Snapshot, Target, values
from reference.loop import Plan, plan, snapshot, train, widened

__all__ = [
    "CASES",
    "Case",
    "Loss",
    "Plan",
    "Snapshot",
    "Target",
    "plan",
    "snapshot",
    "train",
    "values",
    "widened",
]
