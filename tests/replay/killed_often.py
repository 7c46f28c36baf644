"""An adjoint that is killed at random moments, between steps and around every file operation, until it is done.

Prints how often it was killed.
"""

from __future__ import annotations

import math
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from replay.common import Problem, loss_fn

import assay
from assay.replay import state
from assay.replay.backward import Backward

PROBLEM = Problem("adamw", clip=0.4, decay=0.1, schedule=True)


def kill_at(moment: int) -> None:
    """SIGKILL at the so-manieth of the moments."""
    passed = 0

    def mortal(call: Callable[..., Any]) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            count()
            result = call(*args, **kwargs)
            count()
            return result

        return instead

    def count() -> None:
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace, os.unlink = mortal(os.replace), mortal(os.unlink)
    Backward.step = mortal(Backward.step)  # type: ignore[method-assign]


def attempt(run: str, out: str, moment: int) -> None:
    """One attempt, in a process of its own."""
    kill_at(moment)
    state.SHARE = math.inf  # every segment is written
    model = PROBLEM.model()
    values = assay.open(run).adjoint(
        model, PROBLEM.optimizer(model), PROBLEM.batches, loss_fn, PROBLEM.queries()
    )
    torch.save(values, out)


def main(run: str, out: str, seed: int) -> None:
    torch.set_num_threads(1)
    generator, kills = random.Random(seed), 0
    while True:
        moment = generator.randint(1, 40)
        child = os.fork()  # nothing has been computed yet, so there are no threads to lose
        if not child:
            attempt(run, out, moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            print(kills if os.WEXITSTATUS(status) == 0 else f"failed with {os.WEXITSTATUS(status)}")
            return
        kills += 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
