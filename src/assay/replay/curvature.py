"""One micro-batch seen backwards: the Hessian of its loss times λ_g, and every sample's ⟨g_i, λ_g⟩ with it.

The gradient is taken once, with a graph of its own (double backward), under the capture, which explains every use of a
weight: from these uses come the per-sample inner products with λ_g and the points where H λ_g enters the graph
(`links`). All queries share the forward pass and the gradient, and no weight gradient is formed. Whether the model's
operations keep what that takes is compared on the first micro-batch; where they do not, the weights' gradients are
differentiated along λ_g. The Gauss-Newton form Jᵀ (∂²ℓ/∂out²) J λ_g goes through the outputs of a module instead.

Attention runs on its plain kernel here, since the fused ones have no second derivative. Where some other operation
has none, gradients at two near-by points are differenced instead, and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from assay.errors import AssayWarning, InputError
from assay.replay.flat import Flat
from assay.replay.gradient import Gradients, Taken
from assay.replay.links import entries, links, stacked
from assay.snapshots import RandomState
from assay.targets import refuse_delayed_errors

__all__ = ["Curvature", "Seen"]

CURVATURES = ("hessian", "ggn")
ROUGH = {
    torch.float64: 1e-3,
    torch.float32: 0.3,
}  # how near differences must come: kinks and rounding are in them
CACHED = 2 << 20  # bytes of a tensor that passes through the machine without leaving its caches
LINKED = {torch.float64: 1e-9, torch.float32: 1e-3}  # how near the short way must come, relative


class Seen:
    """What one micro-batch gave.

    Args:
        products: `[queries, P]`, H λ_g; None if not asked for.
        scores: `[queries, B]`, ⟨g_i, λ_g⟩.
        loss: of the micro-batch.
    """

    def __init__(self, products: Tensor | None, scores: Tensor, loss: Tensor) -> None:
        self.products, self.scores, self.loss = products, scores, loss


class Curvature:
    """Second derivatives of the training loss at the model's present weights.

    Args:
        model: in the modes that it was trained in.
        flat: its parameters.
        loss_fn: the loss that was differentiated.
        kind: "hessian" or "ggn".
        outputs: for "ggn": the name of the module whose output the loss is a function of; the model itself if left
            out.
        exclude: names of parameters whose per-sample gradients are left out of the values.

    Raises:
        InputError: an unknown kind or module.
    """

    def __init__(
        self,
        model: Module,
        flat: Flat,
        loss_fn: Callable[[Module, Any], Tensor],
        kind: str = "hessian",
        outputs: str | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        if kind not in CURVATURES:
            raise InputError(f"adjoint(curvature={kind!r}) is not known; choose 'hessian' or 'ggn'.")
        modules = dict(model.named_modules())
        if outputs is not None and outputs not in modules:
            raise InputError(f"adjoint(outputs={outputs!r}): the model has no module of that name.")
        self.model, self.flat, self.loss_fn, self.kind = model, flat, loss_fn, kind
        self.outputs = modules[outputs] if outputs else model
        self.gradients = Gradients(model, flat, loss_fn, exclude)
        self.held = 0  # bytes of the graph of the last gradient that was compared
        self._differenced = self._looped = self._verified = False
        self._linked: bool | None = None  # whether the short way is right for this model; not known yet

    def __call__(
        self,
        batch: Any,
        rows: int,
        random: RandomState,
        of_g: Tensor,
        products: bool = True,
        taken: Taken | None = None,
    ) -> Seen:
        """Second derivatives and inner products along λ_g.

        Args:
            batch: the micro-batch.
            rows: B, its samples.
            random: the state of the generators that its forward pass started from.
            of_g: λ_g, `[queries, P]`.
            products: whether H λ_g is wanted.
            taken: its gradient where that was kept, whose graph is used up here; the parameters have its step's values
                again.
        """
        if products and self.kind == "hessian" and not self._differenced:
            try:
                if taken is not None:
                    return self._along(taken, of_g)
                seen = self._twice(batch, rows, random, of_g)
                self._verify(seen, batch, random, of_g)
                return seen
            except (NotImplementedError, RuntimeError) as error:
                if not _no_second_derivative(error):
                    raise
                self._differenced = True
                warnings.warn(
                    f"the training loss cannot be differentiated twice ({str(error).splitlines()[0]}), so its "
                    "curvature is taken from central differences of gradients, exact to about the square root of the "
                    "number format; rewrite the operation for more.",
                    AssayWarning,
                    stacklevel=2,
                )
        if taken is not None:
            taken.close()
        seen, _ = self._watched(batch, rows, random, of_g, twice=False)
        if products:
            form = self._gauss_newton if self.kind == "ggn" else self._difference
            seen.products = form(batch, random, of_g)
        return seen

    def _twice(self, batch: Any, rows: int, random: RandomState, of_g: Tensor) -> Seen:
        """By double backward: from the uses of the weights, once that has been seen to agree; else by way of ∇L."""
        short = None
        if self._linked is not False:
            try:
                short = self._short(batch, rows, random, of_g)
            except RuntimeError:  # a rule that cannot be differentiated, not an operation
                if self._linked:
                    raise
            if short is None:
                self._linked = False
            elif self._linked:
                return short
        compared = of_g if short is None else of_g[:1]
        seen, found = self._watched(batch, rows, random, compared, twice=True)
        seen.products = self._differentiate(found, compared)
        if short is None:
            return seen
        assert short.products is not None
        apart = float((short.products[:1] - seen.products).norm())
        self._linked = apart <= LINKED.get(of_g.dtype, 3e-2) * float(seen.products.norm())
        return short if self._linked else self._twice(batch, rows, random, of_g)

    def _verify(self, seen: Seen, batch: Any, random: RandomState, of_g: Tensor) -> None:
        """Once: the second derivative is near that of differences, which not every operation's own formula is.

        Raises:
            NotImplementedError: it is not.
        """
        if self._verified or seen.products is None:
            return
        self._verified = True
        nearest = math.inf
        for share in (1.0, 1 / 8):  # a nearer pair of points where the third derivative is large
            rough = self._difference(batch, random, of_g[:1], share)
            apart, size = float((rough - seen.products[:1]).norm()), float(rough.norm())
            if apart <= ROUGH.get(of_g.dtype, 1.0) * size:
                return
            nearest = min(nearest, apart / max(size, 1e-300))
        raise NotImplementedError(
            f"an operation's own second derivative is off by {nearest:.0%}, as that of torch's weight_norm is"
        )

    def _short(self, batch: Any, rows: int, random: RandomState, of_g: Tensor) -> Seen | None:
        """H λ_g as the gradient of the samples' inner products: no weight gradient is formed. None: not this model."""
        taken = self.gradients.take(
            batch, rows, random, twice=True, of_weights=False, held=self._linked is None
        )
        if self.gradients.weights.uncovered:  # measured at the model's boundary: they leave no uses
            return None
        self.held = max(self.held, taken.held)
        return self._along(taken, of_g)

    def keep(self, batch: Any, rows: int, random: RandomState) -> Taken:
        """The gradient with its graph, for a call that comes later; only where `keeps` says so."""
        return self.gradients.take(batch, rows, random, twice=True, held=True)

    @property
    def keeps(self) -> bool:
        """Whether graphs can be kept: the short way is known to be right for this model."""
        return self._linked is True and not self._differenced

    def _along(self, taken: Taken, of_g: Tensor) -> Seen:
        """What a gradient with its graph gives: the forward pass and the gradient are shared by all queries.

        The products go through the graph one query at a time where the machine is full with one, and together where a
        pass is mostly overhead.
        """
        uses = taken.capture.put_aside
        scores = taken.scores().new_zeros(len(of_g), taken.capture.batch)
        directions = dict(zip(self.flat.params, self.flat.split(of_g), strict=True))
        together = self._together(len(of_g) * entries(uses), of_g)
        size = len(of_g) if together else 1
        products = []
        for start in range(0, len(of_g), size):
            part = slice(start, start + size)
            some = {p: directions[p][part] for p in self.gradients.weights.params}
            found = links(uses, some, scores[part])
            scores[part] += found.scores
            if start == 0:  # the graph is the same for every query
                refuse_delayed_errors(found.roots)
            curved = self._batched(found.roots, self.flat.params, found.slopes, start + size < len(of_g))
            products.append(self.flat.join_rows(curved, size))
            del found
        taken.close()
        return Seen(products[0] if len(products) == 1 else torch.cat(products), scores, taken.loss)

    def _together(self, entries: int, like: Tensor) -> bool:
        """Whether a tensor of so many entries is small enough that passes of several queries share their overhead."""
        return entries * like.element_size() <= (CACHED if like.device.type == "cpu" else 64 * CACHED)

    def _watched(
        self, batch: Any, rows: int, random: RandomState, of_g: Tensor, twice: bool
    ) -> tuple[Seen, list[Tensor | None]]:
        """The per-sample inner products, and the gradient that they came with."""
        directions = dict(zip(self.flat.params, self.flat.split(of_g), strict=True))
        along = {p: directions[p] for p in self.gradients.weights.params}
        taken = self.gradients.take(batch, rows, random, along, twice=twice)
        return Seen(None, taken.scores(), taken.loss), taken.of_weights

    def _differentiate(self, found: Sequence[Tensor | None], of_g: Tensor) -> Tensor:
        """`[queries, P]`: the gradient differentiated along λ_g, all queries in one pass where that is possible."""
        directions = self.flat.split(of_g)
        pairs = [(g, d) for g, d in zip(found, directions, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(of_g)
        roots = [g for g, _ in pairs]
        refuse_delayed_errors(roots)
        return self.flat.join_rows(
            self._batched(roots, self.flat.params, [d.to(g.dtype) for g, d in pairs]), len(of_g)
        )

    def _batched(
        self, roots: Sequence[Tensor], inputs: Sequence[Tensor], rows: Sequence[Tensor], keep: bool = False
    ) -> list[Tensor | None]:
        """`[queries, *input.shape]`: Σ rowsᵀ ∂roots/∂inputs."""
        queries = len(rows[0]) if rows else 0
        if not roots:
            return [None for _ in inputs]
        if queries > 1 and not self._looped:
            try:
                return list(
                    torch.autograd.grad(
                        roots, inputs, list(rows), is_grads_batched=True, retain_graph=True, allow_unused=True
                    )
                )
            except (RuntimeError, NotImplementedError) as error:
                if _no_second_derivative(error) or "out of memory" in str(error).lower():
                    raise
                self._looped = True  # an operation that cannot be vectorised: one query after the other
        each = [
            torch.autograd.grad(
                roots, inputs, [r[q] for r in rows], retain_graph=keep or q + 1 < queries, allow_unused=True
            )
            for q in range(queries)
        ]
        return [
            None if all(x is None for x in column)
            else stacked([torch.zeros_like(p) if x is None else x for x in column])
            for p, column in zip(inputs, zip(*each, strict=True), strict=True)
        ]  # fmt: skip

    def _gauss_newton(self, batch: Any, random: RandomState, of_g: Tensor) -> Tensor:
        """`[queries, P]`: Jᵀ (∂²ℓ/∂out²) J λ_g."""
        seen: list[Tensor] = []

        def look(_: Module, __: Any, out: Any) -> None:
            seen.extend(x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad and x.dim())

        hook = self.outputs.register_forward_hook(look)
        try:
            with self.gradients.surroundings(random):
                loss = self.loss_fn(self.model, batch)
        finally:
            hook.remove()
        slopes = torch.autograd.grad(loss, seen, create_graph=True, allow_unused=True) if seen else ()
        used = [(x, s) for x, s in zip(seen, slopes, strict=True) if s is not None]
        if not used:
            raise InputError(
                "adjoint(curvature='ggn'): the model hands out no outputs that the loss is a function of; name the "
                "module whose output it is, as outputs='head'."
            )
        outs = [x for x, _ in used]
        pullers = [torch.zeros_like(x, requires_grad=True) for x in outs]
        params = self.flat.params
        pulled = torch.autograd.grad(outs, params, pullers, create_graph=True, allow_unused=True)
        pairs = [
            (g, d)
            for g, d in zip(pulled, self.flat.split(of_g), strict=True)
            if g is not None and g.requires_grad
        ]
        moved = self._batched([g for g, _ in pairs], pullers, [d for _, d in pairs], keep=True)  # J λ_g
        bends = [s for _, s in used]
        if not any(s.requires_grad for s in bends):
            return torch.zeros_like(of_g)  # a loss that is linear in the outputs
        bent = self._batched(bends, outs, [m for m in moved if m is not None], keep=True)
        rows = [
            torch.zeros(len(of_g), *x.shape).to(x) if b is None else b
            for x, b in zip(outs, bent, strict=True)
        ]
        return self.flat.join_rows(self._batched(outs, params, rows), len(of_g))

    def _difference(self, batch: Any, random: RandomState, of_g: Tensor, share: float = 1.0) -> Tensor:
        """`[queries, P]`: (g(w + hλ) − g(w − hλ)) / 2h, h, or a share of it, balancing rounding against ∂³L."""
        start = self.flat.weights()
        eps = torch.finfo(start.dtype).eps ** (1 / 3)
        rows = []
        try:
            for direction in of_g:
                length = float(direction.norm())
                h = share * eps * max(float(start.norm()), 1.0) / max(length, 1e-300)
                ends = []
                for sign in (1, -1):
                    self.flat.put(start + sign * h * direction)
                    with self.gradients.surroundings(random):
                        loss = self.loss_fn(self.model, batch)
                    ends.append(
                        self.flat.join(torch.autograd.grad(loss, self.flat.params, allow_unused=True))
                    )
                rows.append((ends[0] - ends[1]) / (2 * h))
        finally:
            self.flat.put(start)
        return torch.stack(rows)


def _no_second_derivative(error: Exception) -> bool:
    text = str(error)
    known = ("not implemented", "once_differentiable", "second derivative is off")
    return any(words in text for words in known) or "double backward" in text.lower()
