"""The start-up check: one micro-batch, every parameter, against plain autograd on single samples.

Independent of the user's loss: the model's outputs get random gradients R, and for every parameter p a random
direction G_p. What the capture says of ⟨g_i, G_p⟩ must be what autograd says of sample i's outputs
alone; and summed over the samples it must be ⟨.grad, G_p⟩, which no unseen use of a parameter survives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_leaves, tree_map

from assay.capture.coverage import Coverage
from assay.capture.fallback import FORWARD_MODE, SAMPLE_LOOP, Boundary
from assay.capture.mode import Capture
from assay.capture.precision import FullPrecision, Roundings
from assay.capture.weights import Weights, constants_of
from assay.errors import CoverageError
from assay.targets import eagerly, undisturbed

__all__ = ["check_capture"]

TOLERANCE = {torch.float64: 1e-6}  # 5e-3 of all others
ROUNDINGS = 4  # of what half precision is expected to round, where a pass runs in it
FLOOR = 1e-2  # of the largest gradient of a parameter: what counts as a gradient at all
SAMPLES = 2  # single samples compared: the first and the last


def check_capture(
    model: Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    weights: Weights,
    batch: int,
    coverage: Coverage | None = None,
) -> None:
    """Compare the capture with plain autograd on the inputs of one forward pass.

    Parameters for which it fails are left to a fallback (`weights.hand_over`), which is compared in turn.

    Args:
        model: the model; its modes, buffers and gradients are left as they are.
        args: positional arguments of its forward pass, one sample per row of dimension 0.
        kwargs: keyword arguments likewise.
        weights: the watched parameters.
        batch: B.
        coverage: where fallbacks are noted.

    Raises:
        CoverageError: names the parameters whose scores are not what autograd says, by any means.
    """
    comparison = _Comparison(model, args, kwargs, weights, batch)
    try:
        wrong = comparison.wrong(weights, {}, "")
    except Exception as error:
        if isinstance(error, CoverageError) or not comparison.full.met:
            raise
        comparison.as_it_is()  # the model needs its autocast: a cast of its own, a kernel for half precision only
        wrong = comparison.wrong(weights, {}, "")
    if not wrong:
        return
    reasons = []
    if weights.stand_ins:  # a repeated pass would have to replace parameters that are gathered for each pass
        reasons.append("under fully_shard there are none, under DistributedDataParallel there are")
    if comparison.mixes:
        reasons.append(
            "a sample alone gives other outputs than in its batch, so that its loss is not its own"
        )
    fallbacks = {} if weights.stand_ins or comparison.mixes else _FALLBACKS
    for fallback, cost in fallbacks.items():
        try:
            still = comparison.wrong(weights, wrong, fallback)
        except (NotImplementedError, RuntimeError, CoverageError) as error:
            reasons.append(f"{fallback}: {error}")
            continue
        if not still:
            weights.hand_over(wrong, fallback)
            if coverage is not None:
                coverage.fall_back(wrong, fallback, cost)
            return
        reasons.append(f"{fallback}: {next(iter(still.values()))}")
    names = [weights.names[p] for p in wrong]
    raise CoverageError(
        f"the start-up check finds no exact per-sample gradients for {_list(names)}: {next(iter(wrong.values()))}. "
        f"The fallbacks fail too ({'; '.join(reasons)}). Pass exclude=[...] with these names (scores are then "
        "partial), or check='off' if the model mixes the samples of a batch on purpose."
    )


_FALLBACKS = {
    FORWARD_MODE: "a repeated forward pass with derivatives (costs about two forward passes per target)",
    SAMPLE_LOOP: "each sample alone (costs one more forward and backward pass, in pieces of one sample)",
}


class _Comparison:
    """One forward pass of a model, as the capture and as plain autograd see it."""

    def __init__(
        self, model: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Weights, batch: int
    ) -> None:
        self.model, self.batch = model, batch
        self.device = next(model.parameters()).device.type
        # what the caller computed, inputs or weights in the place of the parameters (`functional_call`), is no part of
        # the model, and its graph is still to be used
        self.args, self.kwargs = tree_map(
            lambda x: x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x,
            (args, dict(kwargs)),
        )
        self._given = self.args, self.kwargs
        now = dict(model.named_parameters(remove_duplicate=False))
        self.parameters: dict[str, Tensor] = {
            name: p
            for p, name in weights.names.items()
            if name in now and now[name] is not p and now[name] is not weights.used(p)
        }
        self.mixes = False  # whether a sample alone gives other outputs than in its batch
        self.full = FullPrecision(self.device)  # where a difference means something
        self.precise = True
        if torch.is_autocast_enabled(self.device):
            self.full.met = True
            dtype = next(model.parameters()).dtype
            self.args, self.kwargs = tree_map(
                lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x,
                (self.args, self.kwargs),
            )

    def as_it_is(self) -> None:
        """Compare in the precision of the pass itself."""
        self.args, self.kwargs = self._given
        self.precise = False

    def wrong(
        self, weights: Weights, uncovered: Mapping[Parameter, str], fallback: str
    ) -> dict[Parameter, str]:
        """The parameters whose per-sample gradients are not right, and why; `uncovered` are left to the fallback."""
        alike = _regrouped(weights, self.model, uncovered, fallback)
        generator = torch.Generator(device=weights.params[0].device).manual_seed(0)
        directions = {p: _random(p, generator)[None] for p in weights.params}
        leaves = [weights.used(p) for p in weights.params]
        refused: dict[Parameter, str] = {}
        roundings = Roundings()
        around = torch.autocast(self.device, enabled=False) if self.precise else nullcontext()
        capture = Capture(alike, self.batch, directions, refused=refused)
        capture.takes.append(lambda weight, factors, _: roundings.add(weight.params, factors))
        with undisturbed(self.model), torch.enable_grad(), eagerly(), around, capture.marking():
            with Boundary(self.model, alike, capture) as boundary, capture:
                outputs = self._forward(slice(None))
            rows = sorted({0, self.batch - 1})[:SAMPLES] if self.batch > 1 else []
            alone = [self._forward(slice(i, i + 1)) for i in rows]
            same = [k for k, x in enumerate(outputs) if all(_fits(x, k, one, len(outputs)) for one in alone)]
            if not same:
                return refused  # the model returns nothing per sample (a bare loss): there is nothing to compare with
            pairs = [(outputs[k][i], one[k][0]) for i, one in zip(rows, alone, strict=True) for k in same]
            outputs = [outputs[k] for k in same]
            seeds = [_random(x, generator) for x in outputs]
            with capture:
                found = _gradients(outputs, seeds, [*leaves, capture.probe])
            capture.probe.grad = found[-1]
            with torch.no_grad(), self._precisely():
                scores = boundary.finish()
            assert scores is not None
            seen = scores[:, 0]  # [groups, B]
            if uncovered:
                roundings.add(tuple(uncovered), None)
            rounded = (
                dict.fromkeys(weights.params, roundings.coarsest()) | roundings.found()
            )  # also on the way to a use
            self.mixes = not all(_close(x, y, roundings.coarsest() > 0) for x, y in pairs)
            reason = "its per-sample gradients do not add up to .grad (a use of it was not seen)"
            wrong = dict.fromkeys(_wrong(alike, seen, found[:-1], directions, rounded), reason)
            for i in rows:
                again = self._forward(slice(None))
                truth = _gradients([again[k][i] for k in same], [seed[i] for seed in seeds], leaves)
                reason = f"what sample {i} gives is not what its own use of it gives (do the samples mix?)"
                wrong = {
                    **dict.fromkeys(_wrong(alike, seen[:, i, None], truth, directions, rounded), reason),
                    **wrong,
                }
        return {**wrong, **refused}

    def _precisely(self) -> AbstractContextManager[Any]:
        return self.full if self.precise else nullcontext()

    def _forward(self, rows: slice) -> list[Tensor]:
        def cut(x: Any) -> Any:
            return x[rows] if isinstance(x, Tensor) and x.dim() and x.shape[0] == self.batch else x

        self.model.train().eval()  # a module may have kept tensors of the pass before, with their history
        torch.manual_seed(0)  # the same masks every time; `undisturbed` puts the training run's state back
        args, kwargs = tree_map(cut, self.args), tree_map(cut, dict(self.kwargs))
        with self._precisely():
            if self.parameters:
                out = functional_call(self.model, self.parameters, args, kwargs)
            else:
                out = self.model(*args, **kwargs)
        size = len(range(*rows.indices(self.batch)))
        leaves = [x for x in tree_leaves(_plain(out)) if isinstance(x, Tensor) and x.is_floating_point()]
        return [x for x in leaves if x.requires_grad and x.dim() and len(x) == size]


def _fits(x: Tensor, k: int, alone: list[Tensor], count: int) -> bool:
    """Whether an output has the shape alone that its rows have in the batch (a matrix of all pairs has not)."""
    return len(alone) == count and alone[k].shape[1:] == x.shape[1:]


def _close(x: Tensor, y: Tensor, half: bool) -> bool:
    limit = 0.1 if half or x.dtype.itemsize < 4 else max(TOLERANCE.get(x.dtype, 5e-3), 1e-4)
    return not bool((x - y).norm() > limit * (x.norm() + y.norm()))  # an overflow says nothing


def _regrouped(weights: Weights, model: Module, uncovered: Mapping[Parameter, str], fallback: str) -> Weights:
    """The same parameters, each in a group of its own; those of the fallback share one, so that it runs once."""
    last = len(weights.params)
    groups = {param: last if param in uncovered else k for k, param in enumerate(weights.params)}
    named = [(name, param) for param, name in weights.names.items()]
    alike = Weights(named, groups, constants_of(model), weights.stand_ins)
    alike.hand_over(uncovered, fallback)
    return alike


def _gradients(outputs: list[Tensor], seeds: list[Tensor], leaves: list[Any]) -> list[Tensor]:
    total = sum((x * seed).sum() for x, seed in zip(outputs, seeds, strict=True))
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _wrong(
    weights: Weights,
    parts: Tensor,
    gradients: list[Tensor],
    directions: Mapping[Parameter, Tensor],
    rounded: Mapping[Parameter, float],
) -> list[Parameter]:
    """Parameters whose group's inner products `[groups, any]` do not add up to autograd's, by more than rounding.

    Args:
        weights: the parameters and their groups.
        parts: inner products of the samples.
        gradients: what autograd says.
        directions: G.
        rounded: what half precision has to do with it (`Roundings`).
    """
    seen, squares = parts.sum(1), parts.square().sum(1)
    truth, size = torch.zeros_like(seen), torch.zeros_like(seen)
    for param, gradient in zip(weights.params, gradients, strict=True):
        wide = gradient.to(seen.dtype)
        truth[weights.groups[param]] += (wide * directions[param][0].to(seen.dtype)).sum()
        size[weights.groups[param]] += (
            wide.norm()
        )  # ⟨g, G⟩ has about this size: the entries of G are of order one
    floor = (
        FLOOR * size.nan_to_num(0, 0, 0).max()
    )  # a gradient that is nothing but rounding agrees with no other
    size = size + floor
    tolerance = {weights.groups[p]: TOLERANCE.get(p.dtype, 5e-3) for p in weights.params}
    variance = {weights.groups[p]: rounded[p] for p in weights.params}
    bad = [
        group
        for group, limit in tolerance.items()
        if torch.isfinite(truth[group])  # an overflow says nothing
        and not (seen[group] - truth[group]).abs()
        <= limit * size[group]
        + ROUNDINGS * (variance[group] * (size[group].square() + squares[group])).sqrt()
        + 1e-30
    ]
    return [param for param in weights.params if weights.groups[param] in bad]


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _plain(out: Any) -> Any:
    """Containers that pytree does not know (dataclass-like model outputs) as plain tuples."""
    convert: Callable[[], Any] | None = getattr(out, "to_tuple", None)
    return convert() if convert is not None else out
