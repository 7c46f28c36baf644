"""Scores of parameters that no rule covers, from the boundary of the model.

The inputs of a forward pass and the gradients ∂L/∂out of its outputs are kept. Where every output row belongs to one
sample, sample i's gradient of a parameter W follows without knowing the loss:

    ⟨g_i, G⟩ = ⟨∂L/∂out_i, ∂out_i/∂W·G⟩

* *forward mode*: the pass is repeated with forward-mode derivatives along G, for all such parameters at once: about
  two more forward passes per direction;
* *sample loop*: where an operation has no forward-mode formula, every sample goes through the model alone: one more
  forward and backward pass in all, whatever the number of directions, in B small pieces.

A scalar output (the loss that the model computes itself) counts through the outputs that it was computed from.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from assay.capture.layout import Layout
from assay.capture.marks import Data, Directions, Weight, load_forward_mode
from assay.capture.passes import Pass, differentiable, recorded, surroundings
from assay.capture.weights import Weights
from assay.errors import CoverageError

if TYPE_CHECKING:
    from assay.capture.mode import Capture

__all__ = ["FORWARD_MODE", "SAMPLE_LOOP", "Boundary"]

FORWARD_MODE, SAMPLE_LOOP = "forward mode", "sample loop"


class Boundary:
    """Watches the model's own forward passes during a micro-batch; a context manager around it.

    Args:
        model: the model.
        weights: the watched parameters; those in `weights.uncovered` are measured here.
        capture: the capture of this micro-batch.
    """

    def __init__(self, model: Module, weights: Weights, capture: Capture) -> None:
        self.model, self.weights, self.capture = model, weights, capture
        self.passes: list[Pass] = []
        self._open: list[Pass | None] = []
        if weights.uncovered:
            capture.forgets.append(self._forget)
            capture.inseparable = "the fallback that measures some of them"

    def __enter__(self) -> Boundary:
        """Start watching. A compiled model runs eagerly inside: a compiler cannot trace through the capture."""
        self._eager = contextlib.ExitStack()
        if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
            self._eager.enter_context(torch.compiler.set_stance("force_eager"))
        self._hooks = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._eager.close()
        for hook in self._hooks:
            hook.remove()

    # --- the passes ---

    def _forget(self) -> None:
        for record in self.passes:
            record.gradients.clear()

    def _counted(self) -> list[Pass]:
        """Those for whose outputs something came back."""
        return [record for record in self.passes if record.gradients]

    def _idle(self) -> bool:
        return not self.weights.uncovered or self.capture.paused or not torch.is_grad_enabled()

    def _before(self, model: Module, args: Any, kwargs: Any) -> None:
        record = None
        with self.capture.faults.caught("at the model's inputs"):
            if not self._idle():
                self._refuse_mixing()
                with self.capture.unseen():
                    record = recorded(
                        model, self.weights.params[0].device, args, kwargs, self.weights.outside
                    )
        self._open.append(record)

    def _after(self, model: Module, args: Any, kwargs: Any, out: Any) -> Any:
        record = self._open.pop() if self._open else None
        if record is not None:
            with self.capture.faults.caught("at the model's outputs"):
                return self._watched(record, out)
        return None

    def _watched(self, record: Pass, out: Any) -> Any:
        """The outputs of a pass, each under a node that reads its gradient."""
        now = [torch.cuda.get_rng_state(self.weights.params[0].device)] if record.cuda_random else []
        record.drew_numbers = not torch.equal(record.random, torch.get_rng_state()) or any(
            not torch.equal(a, b) for a, b in zip(record.cuda_random, now, strict=True)
        )
        leaves, spec = tree_flatten(out)
        places = differentiable(leaves)
        if not places:
            raise self._error(
                f"the model returns {type(out).__name__}, in which no tensor with a gradient was found"
            )
        outputs = [leaves[place] for place in places]
        through = {k: self._through(x, outputs, k) for k, x in enumerate(outputs) if not x.dim()}
        record.places = places
        for k, (place, x) in enumerate(zip(places, outputs, strict=True)):
            record.layouts.append(self._layout(x))
            record.sums.append(x.detach().double().sum())
            leaves[place] = x.view_as(x)  # what the caller gets: its gradient is what came from outside
            leaves[place].register_hook(_receiver(record, k, through.get(k), self.capture))
        self.passes.append(record)
        return tree_unflatten(leaves, spec)

    def _layout(self, x: Tensor) -> Layout | None:
        mark = self.capture.mark_of(x)
        if isinstance(mark, Data) and mark.layout is not None:
            return mark.layout
        return Layout(0, self.capture.batch) if x.dim() and len(x) == self.capture.batch else None

    def _through(self, scalar: Tensor, outputs: Sequence[Tensor], own: int) -> dict[int, Tensor]:
        """∂scalar/∂output for the outputs that it was computed from, which must carry all of its gradient."""
        nodes = {(x.grad_fn, x.output_nr): k for k, x in enumerate(outputs) if k != own and x.dim()}
        found: set[int] = set()
        uncovered = {id(p) for p in self.weights.uncovered}
        stack, seen = [(scalar.grad_fn, scalar.output_nr)], set()
        while stack:
            node = stack.pop()
            if node[0] is None or node in seen:
                continue
            seen.add(node)
            if node in nodes:
                found.add(nodes[node])
                continue
            if id(getattr(node[0], "variable", None)) in uncovered:
                raise self._error(
                    "the model computes a scalar from it that does not come from outputs per sample"
                )
            stack.extend(node[0].next_functions)
        chosen = sorted(found)
        with self.capture.unseen(), self.capture.recording(()):
            parts = (
                torch.autograd.grad(scalar, [outputs[k] for k in chosen], retain_graph=True) if chosen else ()
            )
        return dict(zip(chosen, parts, strict=True))

    # --- their scores ---

    def finish(self) -> Tensor | None:
        """`[groups, targets, B]`: the capture's scores with those of the uncovered parameters, or None if it has none.

        Those that wait for a later contraction join `capture.kept`.

        Raises:
            CoverageError: the model's own forward pass was not called, or its outputs mix the samples.
        """
        scores = self.capture.probe.grad
        if not self.weights.uncovered or not (self.passes or self.capture.uses):
            return scores
        if not self._counted():
            raise self._error(
                "the model's own forward pass was not called, or nothing came back for its outputs"
            )
        scores = torch.zeros_like(self.capture.probe) if scores is None else scores
        directions = self.capture.directions
        for weight, factors in self._uses():
            if self.capture.keeps(weight):
                self.capture.keep(weight, factors)
            if directions is not None:
                for group, pushed in weight.push(directions).items():
                    scores[group] += factors.dot(pushed)
        return scores

    def _uses(self) -> Iterator[tuple[Weight, _Outside]]:
        """One use for every parameter group: its uncovered parameters as one long vector."""
        groups: dict[int, list[Parameter]] = {}
        for param in self.weights.uncovered:
            groups.setdefault(self.weights.groups[param], []).append(param)
        for group, params in groups.items():
            yield Weight(tuple(params), _flattened(group, params)), _Outside(self, params)

    def _refuse_mixing(self) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
                raise self._error(f"the batch normalisation {name!r} mixes the samples in training mode")

    def _error(self, reason: str) -> CoverageError:
        names = [self.weights.names[p] for p in self.weights.uncovered]
        why = next(iter(self.weights.uncovered.values()))
        return CoverageError(
            f"parameters {', '.join(names[:5])}{' …' if len(names) > 5 else ''} have a use that no rule follows "
            f"({why}), and the fallback cannot measure them: {reason}. Pass exclude=[...] with these names to leave "
            "them out of the scores (they are then partial), or rewrite the operation."
        )

    @contextlib.contextmanager
    def _again(self, record: Pass) -> Iterator[None]:
        """The random numbers and the autocast of a pass; what comes after is as it was."""
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it has no derivatives
        try:
            with (
                self.capture.unseen(),
                surroundings(self.model, record, self.weights.params[0].device),
                sdpa_kernel(SDPBackend.MATH),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def run(self, record: Pass, values: Mapping[Parameter, Tensor], inputs: Any) -> list[Any]:
        """The outputs that had a gradient, with these parameter values, from copies of the buffers as they were."""
        replaced = {self.weights.names[p]: value for p, value in values.items()}
        buffers = {name: b.clone() for name, b in record.buffers.items()}
        out = functional_call(self.model, {**replaced, **buffers}, *inputs)
        leaves = tree_flatten(out)[0]
        return [leaves[place] for place in record.places if place < len(leaves)]

    def forward_mode(self, params: Sequence[Parameter], directions: Sequence[Tensor]) -> Tensor:
        """`[B]`: one repetition of every pass with derivatives along the directions."""
        total = torch.zeros(
            self.capture.batch, dtype=self.capture.probe.dtype, device=self.capture.probe.device
        )
        load_forward_mode()
        for record in self._counted():
            with self._again(record), torch.no_grad(), forward_ad.dual_level():
                duals = {p: _dual(p, G) for p, G in zip(params, directions, strict=True)}
                found = [_parts(x) for x in self.run(record, duals, (record.args, record.kwargs))]
            self._compare(record, [pair.primal for pair in found])
            for k, gradient in record.gradients.items():
                tangent = found[k].tangent
                if tangent is not None:
                    total = total + self._where(record, k).per_sample_sum(tangent.to(total.dtype) * gradient)
        return total

    def _compare(self, record: Pass, found: Sequence[Tensor]) -> None:
        """The repetition must have been one."""
        if not record.is_repeated_by(dict(enumerate(found))):
            raise self._error("the forward pass gives other outputs when it is repeated")

    def _where(self, record: Pass, k: int) -> Layout:
        layout = record.layouts[k]
        if layout is None:
            raise self._error(f"output {k} of the model, which the loss uses, has no row per sample")
        return layout

    def _row(self, x: Any, i: int) -> Any:
        """What sample i has of an input."""
        rows = isinstance(x, Tensor) and x.dim() and len(x) == self.capture.batch
        return x[i : i + 1] if rows and not self.weights.outside.is_constant(x) else x

    def sample_loop(self, params: Sequence[Parameter]) -> Iterator[tuple[int, list[Tensor]]]:
        """Every sample's gradients `[*shape]`, pass by pass."""
        batch = self.capture.batch
        for record in self._counted():
            if record.drew_numbers:
                raise self._error(
                    "it draws random numbers (dropout), which one sample at a time would draw anew"
                )
            for i in range(batch):
                inputs = tree_map(lambda x, i=i: self._row(x, i), (record.args, record.kwargs))
                with self._again(record), torch.enable_grad():
                    values = {p: p.detach().requires_grad_() for p in params}
                    found = self.run(record, values, inputs)
                    rows = [
                        (found[k], _own(self._where(record, k), g, i)) for k, g in record.gradients.items()
                    ]
                    if any(x.shape != g.shape for x, g in rows):
                        raise self._error("a sample alone gives outputs of other shapes than in the batch")
                    rows = [(x, g) for x, g in rows if x.requires_grad]
                    gradients = torch.autograd.grad(
                        [x for x, _ in rows], list(values.values()), [g for _, g in rows], allow_unused=True
                    )
                yield (
                    i,
                    [torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)],
                )


class _Outside:
    """The per-sample gradients of some parameters as one long vector, measured at the model's boundary."""

    def __init__(self, boundary: Boundary, params: list[Parameter]) -> None:
        self.boundary, self.params = boundary, params

    def dot(self, directions: Tensor) -> Tensor:
        """`[targets, B]`: ⟨g_i, G_n⟩ for directions `[targets, entries]`."""
        if self.boundary.weights.fallback == FORWARD_MODE:
            return torch.stack([self.boundary.forward_mode(self.params, self._split(G)) for G in directions])
        like = self.boundary.capture.probe
        scores = torch.zeros(
            len(directions), self.boundary.capture.batch, dtype=like.dtype, device=like.device
        )
        for i, gradients in self.boundary.sample_loop(self.params):
            scores[:, i] += directions.to(scores.dtype) @ torch.cat([g.flatten() for g in gradients]).to(
                scores.dtype
            )
        return scores

    def _split(self, G: Tensor) -> list[Tensor]:
        parts = G.split([p.numel() for p in self.params])  # type: ignore[no-untyped-call]
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]


def _flattened(group: int, params: list[Parameter]) -> Callable[[Directions], dict[int, Tensor]]:
    return lambda directions: {
        group: torch.cat([directions[p].reshape(len(directions[p]), -1) for p in params], 1)
    }


def _receiver(
    record: Pass, output: int, through: Mapping[int, Tensor] | None, capture: Capture
) -> Callable[[Tensor], None]:
    """What happens with ∂L/∂output; a scalar hands it on to the outputs that it was computed from."""

    def receive(gradient: Tensor) -> None:
        if capture.idle:
            return
        with torch._C.DisableTorchFunction(), capture.faults.caught("in the backward pass"):
            if through is None:
                record.came_back(output, gradient)
            for k, part in (through or {}).items():
                record.came_back(k, part * gradient)

    return receive


def _dual(param: Parameter, direction: Tensor) -> Any:
    return forward_ad.make_dual(param.detach(), direction.to(param.dtype))  # type: ignore[no-untyped-call]


def _parts(x: Tensor) -> Any:
    return forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]


def _own(layout: Layout, gradient: Tensor, i: int) -> Tensor:
    """The rows of sample i."""
    rows = layout.row_labels(gradient.shape[layout.dim], gradient.device) == i
    return gradient.movedim(layout.dim, 0)[rows].movedim(0, layout.dim)
