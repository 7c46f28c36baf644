"""How an operation carries the positions of a sequence from its inputs to its output.

Positions are followed as samples are, with two differences. They may meet: in attention every position sees all, and
the result stands where the query stood, so that the first operand that still has a place decides. And nothing depends
on them but to which position a value is booked: where they cannot be followed they are lost, until an operand that
has them (a residual stream) joins again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from assay.capture.layout import Layout
from assay.capture.track import ALONG, follow
from assay.capture.track.common import Args, Kwargs

__all__ = ["follow_tokens"]


def follow_tokens(
    name: str,
    data: Sequence[tuple[Tensor, Layout]],
    args: Args,
    kwargs: Kwargs,
    out: Tensor,
    position: int = 0,
) -> Layout | None:
    """The places of the positions in `out`; the arguments are those of `follow`, with operands that have positions."""
    if name in _LOST or not out.dim():
        return None
    for operands in (data, *([one] for one in data)):
        found = _followed(name, operands, args, kwargs, out, position)
        if found is not None and found.dim < out.dim() and _fits(found, out):
            return found
    return None


def _followed(
    name: str, data: Sequence[tuple[Tensor, Layout]], args: Args, kwargs: Kwargs, out: Tensor, position: int
) -> Layout | None:
    x, layout = data[0]
    if name in ALONG and out.shape == x.shape:
        return layout  # a position's share of a softmax or a running sum is that position's
    if name == "pad":
        return _padded(layout, x, args, kwargs, out)
    if name == "linear" and layout.dim == x.dim() - 1:
        return None  # positions mixed by a weight
    if name in ("conv1d", "conv_transpose1d") and out.shape[-1] > x.shape[-1] and layout.dim == x.dim() - 1:
        return _behind(layout, x, out)
    return follow(name, data, args, kwargs, out, position)


def _fits(layout: Layout, out: Tensor) -> bool:
    rows = out.shape[layout.dim]
    return (
        len(layout.labels) == rows if layout.labels is not None else rows % (layout.batch * layout.inner) == 0
    )


def _padded(layout: Layout, x: Tensor, args: Args, kwargs: Kwargs, out: Tensor) -> Layout | None:
    """`F.pad(x, [left, right] of the last dimension, of the one before, …)`: the new rows are no position's."""
    pads = kwargs.get("pad", args[1] if len(args) > 1 else ())
    behind = x.dim() - 1 - layout.dim
    if len(pads) <= 2 * behind:
        return layout
    left, right = pads[2 * behind], pads[2 * behind + 1]
    if left < 0 or right < 0:
        return None
    labels = layout.row_labels(x.shape[layout.dim], x.device)
    return layout.labelled(layout.dim, torch.nn.functional.pad(labels, (left, right), value=-1))


def _behind(layout: Layout, x: Tensor, out: Tensor) -> Layout:
    """A convolution padded at both ends so that a cut makes it causal: the rows behind the last are no position's."""
    labels = layout.row_labels(x.shape[-1], x.device)
    return layout.labelled(
        layout.dim, torch.nn.functional.pad(labels, (0, out.shape[-1] - len(labels)), value=-1)
    )


# functions whose result has no position although a dimension may have the size of one
_LOST = frozenset({"embedding_bag", "interpolate", "adaptive_avg_pool1d", "unfold", "fold"})
