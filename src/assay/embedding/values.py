"""In-run values for a target that did not exist while the model trained.

v_i = ∇ℓ(w)ᵀ K_t g_i with K_t g_i as it was recorded, projected, and ∇ℓ at the run's snapshots, projected alike; between
two snapshots the gradient is taken to change linearly.
"""

from __future__ import annotations

from typing import Literal

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module

from assay.capture.sides import Sides
from assay.embedding.header import SCALARS
from assay.embedding.recorded import Recorded
from assay.errors import InputError
from assay.index.layers import weights_named
from assay.methods.line import placed
from assay.rows import Folder
from assay.store.tensors import TensorFiles
from assay.targets import Target, TargetPass

__all__ = ["Path", "value_for"]

Path = Literal["left", "trapezoid"]


def value_for(
    folder: Folder, snapshots: TensorFiles, model: Module, target: Target, path: Path
) -> pl.DataFrame:
    """`step, id, value`, in the order of recording.

    Args:
        folder: of the recorded gradients.
        snapshots: of the same run.
        model: of the run's architecture; its weights are put back afterwards.
        target: what the samples are valued for.
        path: "left" takes the gradient at the step's beginning, "trapezoid" its mean over the step.

    Raises:
        InputError: nothing was recorded, there are no snapshots, or an argument is not understood.
        StoreError: a file is damaged; it is named.
    """
    if path not in ("left", "trapezoid"):
        raise InputError(f"value_for(path={path!r}) is not known; choose 'left' or 'trapezoid'.")
    recorded = Recorded(folder)
    numbers = snapshots.numbers("state")
    if not numbers:
        raise InputError("value_for() needs snapshots of the weights: train with Run(..., snapshots='auto').")
    gradients = _gradients(recorded, snapshots, numbers, model, target)
    entries = recorded.header.entries()
    speed, scale = (SCALARS.index(name) for name in ("speed", "scale"))
    place = 1 if recorded.header.preconditioned else 0
    values = torch.empty(recorded.length, dtype=torch.float64)
    for first, last in recorded.windows(0, len(recorded.steps)):
        begin = recorded.steps[first].start
        rows = recorded.read(begin, recorded.steps[last - 1].stop)[:, place]
        for step in recorded.steps[first:last]:
            at = step.number + (0.5 if path == "trapezoid" else 0.0)
            factor = (step.scalars[:, speed] * step.scalars[:, scale])[entries]
            direction = (_between(gradients, numbers, at) * factor).to(rows)
            values[step.start : step.stop] = (
                rows[step.start - begin : step.stop - begin] @ direction
            ).double()
    return recorded.table.with_columns(value=pl.Series(values.numpy()))


def _gradients(
    recorded: Recorded, snapshots: TensorFiles, numbers: list[int], model: Module, target: Target
) -> Tensor:
    """`[snapshots, width]` float64: P ∇ℓ at each of them."""
    weights = weights_named(model, recorded.header.shapes)
    sides = recorded.header.sides(recorded.folder, weights)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    passes = TargetPass(model, {"target": target}, weights.params)
    found = []
    for number in numbers:
        state = snapshots.read("state", number)
        there = {
            tensors[name]: value for part in ("weights", "buffers") for name, value in state[part].items()
        }
        with torch.no_grad(), placed(there):  # type: ignore[arg-type]
            _, gradient = passes.gradients()
        parts = [_projected(gradient[p][0], sides[name]) for p, name in weights.names.items()]
        found.append(torch.cat(parts))
    return torch.stack(found)


def _projected(gradient: Tensor, sides: Sides) -> Tensor:
    """`[width]`: P G."""
    G = gradient.detach().double().cpu().reshape(sides.matrix)
    return sides.applied(sides.read(G)).flatten()


def _between(gradients: Tensor, numbers: list[int], at: float) -> Tensor:
    """`[width]`: at a point of the run, linear between the snapshots around it."""
    after = next((n for n, number in enumerate(numbers) if number >= at), len(numbers) - 1)
    before = max(after - 1, 0)
    if numbers[after] <= at or after == before:
        return gradients[after]
    share = (at - numbers[before]) / (numbers[after] - numbers[before])
    return gradients[before].lerp(gradients[after], share)
