"""Influence averaged over several checkpoints, each with an index of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import polars as pl
import torch
from torch import Tensor
from torch.nn import Module

from assay.errors import InputError
from assay.index.curvature import Curvature
from assay.index.index import Index
from assay.methods.influence import Normalize
from assay.projection import LossFn

__all__ = ["average_influence"]


def average_influence(
    members: Iterable[tuple[Index, Module]],
    queries: Sequence[object],
    loss_fn: LossFn,
    weights: Sequence[float] | None = None,
    damping: float = 0.1,
    normalize: Normalize | None = None,
    curvature: Curvature = "fisher",
) -> Tensor:
    """`[Q, N]`: the weighted mean of each checkpoint's influence, in the order of the first index's rows.

    * TracIn (Pruthi et al., arXiv 2002.08484, eq. 2): checkpoints of one run, their learning rates for `weights`, and
      `curvature="identity"`.
    * An ensemble as in TRAK (Park et al., arXiv 2303.14186, section 3.2): checkpoints of independent runs.

    Args:
        members: `(index, model)` pairs, the model at the weights that were indexed; pairs may be made one by one.
        queries: batches, gone through once per member.
        loss_fn: as in `Index.influence`.
        weights: of the members; equal by default. They are divided by their sum.
        damping: as in `Index.influence`.
        normalize: as in `Index.influence`.
        curvature: as in `Index.influence`.

    Raises:
        InputError: there is no member, the ids of two indexes differ, or `weights` do not fit.

    Example:
        >>> from assay import Index
        >>> x, y = torch.randn(4, 3), torch.randn(4, 1)
        >>> def loss_fn(model, batch):
        ...     return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> models = [torch.nn.Linear(3, 1) for _ in range(2)]
        >>> members = [(Index.build(model, [(range(4), (x, y))], loss_fn), model) for model in models]
        >>> average_influence(members, [(x, y)], loss_fn).shape
        torch.Size([4, 4])
    """
    total: Tensor | None = None
    ids: pl.Series | None = None
    shares = [] if weights is None else [float(w) for w in weights]
    count = 0
    for index, model in members:
        if weights is not None and count >= len(shares):
            raise InputError(f"weights: {len(shares)} of them for more checkpoints; give one for each.")
        scores = index.influence(model, queries, loss_fn, damping, normalize, curvature)
        scores = scores * (1.0 if weights is None else shares[count])
        if total is None or ids is None:
            total, ids = scores, index.ids
        else:
            total += scores[:, _order(index.ids, ids)]
        count += 1
    if total is None:
        raise InputError("members: there is none; give at least one (index, model).")
    if weights is not None and (len(shares) != count or sum(shares) <= 0):
        raise InputError(
            f"weights: {len(shares)} of them for {count} checkpoints; give one for each, not all 0."
        )
    return total / (count if weights is None else sum(shares))


def _order(ids: pl.Series, wanted: pl.Series) -> Tensor:
    """`[N]`: where the wanted ids stand."""
    if ids.equals(wanted):
        return torch.arange(len(ids))
    places = {id_: row for row, id_ in enumerate(ids)}
    if len(places) != len(ids) or set(places) != set(wanted) or len(wanted) != len(ids):
        raise InputError(
            "members: two indexes hold other ids (or repeat some): build them from the same examples."
        )
    return torch.tensor([places[id_] for id_ in wanted])
