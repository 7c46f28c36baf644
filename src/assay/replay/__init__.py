"""The run backwards: the exact effect of leaving a sample out, by the adjoint of the whole training.

`adjoint` replays segment by segment (`forward`), checks that the replay is the run (`check`), and carries the adjoint
of weights and optimizer's state back (`optimizers`, `clipping`, `curvature`).
"""

from assay.replay.backward import AdjointOptions, Queries, adjoint
from assay.replay.compare import TABLE, agreement
from assay.replay.forward import Batches, Loss
from assay.replay.smoothness import Smoothness, metasmoothness
from assay.replay.trajectory import Trajectory

__all__ = [
    "TABLE",
    "AdjointOptions",
    "Batches",
    "Loss",
    "Queries",
    "Smoothness",
    "Trajectory",
    "adjoint",
    "agreement",
    "metasmoothness",
]
