"""Ground truths: slow answers, by their definitions, that the fast ones are measured against."""

from assay.evaluate.lds import linear_datamodeling_score, rank_correlation
from assay.evaluate.shapley import StepUtility, monte_carlo_shapley, sample_gradients, shapley_values
from assay.evaluate.tsloo import Removal, Training, leave_out, occurrences, retrain

__all__ = [
    "Removal",
    "StepUtility",
    "Training",
    "leave_out",
    "linear_datamodeling_score",
    "monte_carlo_shapley",
    "occurrences",
    "rank_correlation",
    "retrain",
    "sample_gradients",
    "shapley_values",
]
