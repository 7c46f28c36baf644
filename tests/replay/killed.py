"""An adjoint that dies after two segments."""

from __future__ import annotations

import math
import os
import signal
import sys

import torch
from replay.common import Problem, loss_fn

import assay
from assay.replay import state

PROBLEM = Problem("adamw", clip=0.4, decay=0.1, schedule=True)


def die(done: int, of: int) -> None:
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    state.SHARE = math.inf  # every segment is written
    model = PROBLEM.model()
    assay.open(sys.argv[1]).adjoint(
        model, PROBLEM.optimizer(model), PROBLEM.batches, loss_fn, PROBLEM.queries(), progress=die
    )
