"""Ground truths: slow answers, by their definitions, that the fast ones are measured against."""

from assay.evaluate.shapley import StepUtility, monte_carlo_shapley, sample_gradients, shapley_values

__all__ = ["StepUtility", "monte_carlo_shapley", "sample_gradients", "shapley_values"]
