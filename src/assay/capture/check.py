"""The start-up check: one micro-batch, every parameter, against plain autograd on single samples.

Independent of the user's loss: the model's outputs get random gradients R, and for every parameter p a random
direction G_p. What the capture says of ⟨g_i, G_p⟩ must be what autograd says when sample i goes through the model
alone; and summed over the samples it must be ⟨.grad, G_p⟩, which no unseen use of a parameter survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves, tree_map

from assay.capture.mode import Capture, Weights
from assay.errors import CoverageError
from assay.targets import undisturbed

__all__ = ["check_capture"]

TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3}
SAMPLES = 2  # single samples compared: the first and the last


def check_capture(
    model: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Weights, batch: int
) -> None:
    """Compare the capture with plain autograd on the inputs of one forward pass.

    Args:
        model: the model; its modes, buffers and gradients are left as they are.
        args: positional arguments of its forward pass, one sample per row of dimension 0.
        kwargs: keyword arguments likewise.
        weights: the watched parameters.
        batch: B.

    Raises:
        CoverageError: names the parameters whose scores are not what autograd says.
    """
    one_by_one = Weights(
        [(name, param) for param, name in weights.names.items()],
        {param: k for k, param in enumerate(weights.params)},
        model.buffers(),
    )
    generator = torch.Generator(device=weights.params[0].device).manual_seed(0)
    directions = {p: _random(p, generator)[None] for p in weights.params}

    def forward(rows: slice) -> list[Tensor]:
        def cut(x: Any) -> Any:
            return x[rows] if isinstance(x, Tensor) and x.dim() and x.shape[0] == batch else x

        out = model(*tree_map(cut, args), **tree_map(cut, dict(kwargs)))
        rows_out = len(range(*rows.indices(batch)))
        leaves = tree_leaves(_plain(out))
        return [
            x
            for x in leaves
            if isinstance(x, Tensor)
            and x.requires_grad
            and x.is_floating_point()
            and x.dim()
            and len(x) == rows_out
        ]

    with undisturbed(model), torch.enable_grad():
        capture = Capture(one_by_one, batch, directions)
        with capture:
            outputs = forward(slice(None))
        if not outputs:
            return  # the model returns nothing per sample (a bare loss): there is nothing to compare with
        seeds = [_random(x, generator) for x in outputs]
        with capture:
            found = _gradients(outputs, seeds, [*weights.params, capture.probe])
        seen = found[-1][:, 0]  # [parameters, B]
        _compare_totals(one_by_one, seen, found[:-1], directions)
        for i in sorted({0, batch - 1})[:SAMPLES] if batch > 1 else []:
            alone = forward(slice(i, i + 1))
            truth = _gradients(alone, [seed[i : i + 1] for seed in seeds], weights.params)
            _compare_sample(one_by_one, seen[:, i], truth, directions, i)


def _gradients(outputs: list[Tensor], seeds: list[Tensor], leaves: list[Any]) -> list[Tensor]:
    total = sum((x * seed).sum() for x, seed in zip(outputs, seeds, strict=True))
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _compare_totals(
    weights: Weights, seen: Tensor, gradients: list[Tensor], directions: Mapping[Parameter, Tensor]
) -> None:
    wrong = _wrong(weights, seen.sum(1), gradients, directions)
    if wrong:
        raise CoverageError(
            f"the start-up check found uses of {_list(wrong)} that the capture did not see: the per-sample gradients "
            "do not add up to .grad. Is it used inside a custom autograd.Function, or through a copy made outside the "
            "step? Use a plain torch operation, or pass exclude=[...] with these names (scores are then partial)."
        )


def _compare_sample(
    weights: Weights, seen: Tensor, gradients: list[Tensor], directions: Mapping[Parameter, Tensor], i: int
) -> None:
    wrong = _wrong(weights, seen, gradients, directions)
    if wrong:
        raise CoverageError(
            f"the start-up check found wrong per-sample gradients for {_list(wrong)}: sample {i} alone gives others. "
            "Either the model mixes the samples of a batch before this parameter, or dimension 0 of an input is not "
            "the samples. Pass exclude=[...] with these names, or check='off' if the mixing is intended."
        )


def _wrong(
    weights: Weights, seen: Tensor, gradients: list[Tensor], directions: Mapping[Parameter, Tensor]
) -> list[str]:
    """Names of parameters whose inner products differ by more than rounding."""
    names = []
    for param, value, gradient in zip(weights.params, seen, gradients, strict=True):
        direction = directions[param][0]
        wide = torch.promote_types(gradient.dtype, torch.float32)
        truth = (gradient.to(wide) * direction.to(wide)).sum()
        size = gradient.to(wide).norm()  # ⟨g, G⟩ has about this size: the entries of G are of order one
        if (
            not torch.isfinite(value)
            or (value - truth).abs() > TOLERANCE.get(param.dtype, 0.1) * size + 1e-12
        ):
            names.append(weights.names[param])
    return names


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _plain(out: Any) -> Any:
    """Containers that pytree does not know (dataclass-like model outputs) as plain tuples."""
    convert: Callable[[], Any] | None = getattr(out, "to_tuple", None)
    return convert() if convert is not None else out
