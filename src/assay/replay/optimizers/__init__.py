"""The adjoint of each optimizer's step: one short file per family, the formulas in its docstring."""

from assay.replay.optimizers.base import OptimizerAdjoint, Vectors
from assay.replay.optimizers.select import adjoint_of

__all__ = ["OptimizerAdjoint", "Vectors", "adjoint_of"]
