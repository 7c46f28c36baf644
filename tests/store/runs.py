"""A small run that the tests of faults record, and the check that it is whole."""

from __future__ import annotations

import numpy as np

from assay.store import Ledger, RunWriter


def fill(writer: RunWriter, steps: range) -> None:
    for step in steps:
        writer.add_values(step, 0, [0, 1 + step], np.array([[1.0], [step / 8]]))
        writer.add_account(step, "t", 1.0, 0.0, 0.0, 1.0, 0.0)


def check(ledger: Ledger, steps: int) -> None:
    """The ledger holds these steps, all of them, each once."""
    assert ledger.steps().rows() == [row for s in range(steps) for row in ((s, 0, 1.0), (s, 1 + s, s / 8))]
    assert ledger.account()["step"].to_list() == list(range(steps))
