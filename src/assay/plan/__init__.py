"""What an attribution will cost, before anything is spent: bytes and floating-point operations from the sizes alone.

    Shape                    the matrices of a network, as one token meets them
    Training                 how much it is trained
    in_run, embeddings, …    Work of a method: operations, disk, memory

Operations are counted as `torch.utils.flop_counter` counts them: two per multiply-add of a matrix product, nothing
for what is element-wise, attention in full (a causal kernel does half of it).
"""

from assay.plan.cost import Training, Work, adjoint, embeddings, in_run, index, training
from assay.plan.shape import KNOWN, Shape, shape_of
from assay.plan.units import as_bytes, as_share, as_time

__all__ = [
    "KNOWN",
    "Shape",
    "Training",
    "Work",
    "adjoint",
    "as_bytes",
    "as_share",
    "as_time",
    "embeddings",
    "in_run",
    "index",
    "shape_of",
    "training",
]
