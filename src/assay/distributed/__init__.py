"""Training in several processes: what is reduced over them, and what each of them holds of the model."""

from assay.distributed.detect import parallel_of
from assay.distributed.processes import OneProcess, local

__all__ = ["OneProcess", "local", "parallel_of"]
