"""Every way in which per-sample gradients are contracted, to be forced in turn: each must give the same values.

The fused kernel is one more; it runs on a GPU or in Triton's interpreter (`tests/capture/interpreted.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from assay.capture import contraction, layer_norm, probe
from assay.methods import step as reading

FORMS = ("all samples at once", "one sample at a time", "two at a time", "directional")


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Inside, whatever the cost model would choose, uses of weights are contracted in this form."""
    with pytest.MonkeyPatch.context() as patch:
        choice = "directional" if form == "directional" else "batched"
        patch.setattr(contraction, "cheapest", lambda *sizes: choice)
        samples = {"all samples at once": 1 << 20, "one sample at a time": 1, "two at a time": 2}.get(form)
        if samples is not None:
            patch.setattr(contraction.CostModel, "samples_per_block", lambda *sizes: samples)
        patch.setattr(contraction.CostModel, "forms_alone", lambda *sizes: form == "one sample at a time")
        if form == "one sample at a time":
            patch.setattr(layer_norm, "ALONE", 1)
        if form == "two at a time":
            patch.setattr(layer_norm, "BLOCK", 1)
            patch.setattr(reading, "PIECE", 3)  # entries of a parameter
        if form == "directional":  # nor are per-sample gradients written out to be kept
            patch.setattr(probe, "per_sample_gradients", lambda *factors: None)
        yield
