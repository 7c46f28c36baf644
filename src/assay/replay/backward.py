"""The exact answer: the adjoint of the whole run, step by step from its end to its beginning.

A step takes the state (w, optimizer's buffers) to the next one through its gradient g(w) = Σ_i g_i. With λ the
derivative of a query's loss after training with respect to the state behind the step, the optimizer's and the
clipping's adjoints give λ_g, and

    λ_w ← λ_w + H λ_g          H the Hessian of the step's training loss
    value of sample i at this step = −λ_gᵀ g_i

to first order the effect of leaving the sample out of this step on the query's loss after training: nothing of the
optimizer is approximated. It starts from λ = (∇ℓ(w_T), 0, …).

Source: reverse-mode differentiation of training, Maclaurin, Duvenaud and Adams, ICML 2015, arXiv 1502.03492; as data
attribution, Ilyas and Engstrom, MAGIC, arXiv 2504.16430, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from assay.errors import InputError
from assay.replay.check import tolerance_of
from assay.replay.clipping import Clipping, recorded_clipping
from assay.replay.curvature import Curvature
from assay.replay.flat import Flat, Span
from assay.replay.forward import Batches, Forward, Loss, Stash
from assay.replay.graphs import GRAPHS, Graphs
from assay.replay.optimizers import Vectors, adjoint_of
from assay.replay.optimizers.base import WEIGHTS
from assay.replay.state import Progress, ProgressFiles
from assay.replay.trajectory import Trajectory
from assay.store.tensors import TensorFiles
from assay.targets import Target, TargetPass

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdjointOptions", "Backward", "Queries", "adjoint", "clipping_of", "start_of", "targets_of"]

Queries = Sequence[Any] | Mapping[str, Target]
BLOCK = 1 << 17  # entries of a vector that the optimizer's adjoint takes at a time


class AdjointOptions(TypedDict, total=False):
    """Options of `Ledger.adjoint`.

    Attributes:
        query_loss: `query_loss(model, query)`, a scalar, the model in evaluation mode; `loss_fn` if left out.
        steps: only the samples of these steps are valued; nothing before the first of them is visited.
        last: only the last so many steps.
        curvature: "hessian", or "ggn" for the Gauss-Newton matrix in its place.
        outputs: for "ggn", the name of the module whose output the loss is a function of; the model itself by default.
        clip: the norm that gradients were clipped to, or None; "recorded" reads from the run's log what was done.
        exclude: names of parameters whose per-sample gradients are left out of the values.
        graphs: memory for graphs of gradients that are kept from the replay of their step until its turn comes on the
            way back, which saves that step a pass: bytes, or such as "2 GB", the default; 0 keeps none.
        progress: called after each segment with how many steps are done, and how many there are.
    """

    query_loss: Loss | None
    steps: Iterable[int] | None
    last: int | None
    curvature: str
    outputs: str | None
    clip: float | Literal["recorded"] | None
    exclude: Sequence[str]
    graphs: int | str
    progress: Callable[[int, int], None] | None


def adjoint(
    files: TensorFiles | None,
    model: Module,
    optimizer: Optimizer,
    batches_of_step: Batches,
    loss_fn: Loss,
    queries: Queries,
    **options: Unpack[AdjointOptions],
) -> Tensor:
    """Values of every sample at every step, exact to first order in leaving it out; see `Ledger.adjoint`."""
    curvature, outputs = options.get("curvature", "hessian"), options.get("outputs")
    exclude, progress = options.get("exclude", ()), options.get("progress")
    trajectory = Trajectory(files)
    clipping = clipping_of(trajectory, model, options.get("clip", "recorded"))
    forward = Forward(model, optimizer, trajectory, batches_of_step, loss_fn, clipping, adjoint_of(optimizer))
    chosen = _chosen(trajectory, options.get("steps"), options.get("last"))
    folder = None if files is None or files.folder is None else files.folder.parent / "adjoint"
    settings = {
        "curvature": curvature, "outputs": outputs, "clip": [clipping.largest, clipping.factor],
        "exclude": sorted(exclude), "steps": sorted(chosen), "end": trajectory.end,
    }  # fmt: skip
    with forward.borrowed():
        forward.restore(trajectory.end)
        start = start_of(model, forward.flat, queries, options.get("query_loss") or loss_fn)
        kept = ProgressFiles(folder, settings, start)
        curved = Curvature(model, forward.flat, loss_fn, curvature, outputs, exclude)
        graphs = Graphs(curved, options.get("graphs", GRAPHS), min(chosen))
        backward = Backward(forward, curved, chosen, graphs)
        backward.compare(start)
        state = kept.read(start.device) or Progress(trajectory.end, backward.begin(start), {})
        for begin, end in trajectory.segments(min(chosen)):
            if end > state.step:
                continue
            fresh = backward.segment(begin, end, state)
            kept.write(state, fresh)
            if progress is not None:
                progress(trajectory.end - begin, trajectory.end - min(chosen))
        kept.clear()
    return _table(trajectory, state.values, len(start))


class Backward:
    """Carries adjoints back through the steps.

    Args:
        forward: replays the segments.
        curvature: of the training loss.
        chosen: the steps whose samples are valued; none before the first of them is visited.
        graphs: says which steps' gradients keep their graphs.
    """

    def __init__(
        self, forward: Forward, curvature: Curvature, chosen: frozenset[int], graphs: Graphs
    ) -> None:
        self.forward, self.curvature, self.chosen, self.graphs = forward, curvature, chosen, graphs
        self.first = min(chosen)

    def compare(self, start: Tensor) -> None:
        """Let the curvature find its way on the last step's data, at the weights that are there.

        Before the first segment, so that an adjoint that goes on where one was killed does the same as that one.
        """
        records = [r for t, r in sorted(self.forward.trajectory.records.items()) if not r.skipped]
        if records and records[-1].step > self.first:
            ids, batch = self.forward.batches_of(records[-1])[0]
            self.curvature(batch, len(ids), records[-1].random[0], start[:1])

    def begin(self, start: Tensor) -> Vectors:
        """Adjoints at the end of training."""
        return {WEIGHTS: start} | {n: torch.zeros_like(start) for n in self.forward.adjoint.buffers}

    def segment(self, begin: int, end: int, state: Progress) -> list[int]:
        """Take the state from the end of a segment to its beginning; the steps that were valued."""
        replayed = self.forward.segment(begin, end, graphs=self.graphs)
        stashes = [stash for stash in replayed if stash is not None]
        fresh = []
        while stashes:
            stash = stashes.pop()  # its memory goes as soon as it is done
            t = stash.record.step
            if t < self.first:
                break
            values = self.step(stash, state.adjoints, products=t > self.first)
            if t in self.chosen:
                state.values[t] = values
                fresh.append(t)
        state.step = begin
        return fresh

    def step(self, stash: Stash, adjoints: Vectors, products: bool = True) -> Tensor:
        """One step back: `adjoints` become those before it; `[queries, rows]`, the values of its samples.

        Raises:
            InputError: the gradient came out differently from that of the forward replay.
        """
        forward = self.forward
        forward.flat.put(stash.weights)
        scale = forward.clipping.scale(stash.norm)
        of_received = forward.flat.empty(len(adjoints[WEIGHTS]), adjoints[WEIGHTS].dtype)
        for span in stash.spans:
            if not span.active:
                of_received[:, span.start : span.stop] = 0
                continue
            for where in _blocks(span, adjoints[WEIGHTS]):
                of_received[:, where] = forward.adjoint.pull(
                    stash.record.groups[span.group],
                    span.count,
                    {WEIGHTS: stash.weights[where]} | {n: x[where] for n, x in stash.buffers.items()},
                    scale * stash.gradient[where],
                    {n: x[:, where] for n, x in adjoints.items()},
                )
        of_g = forward.clipping.pull(stash.gradient, stash.norm, of_received)
        if stash.share != 1:
            of_g = of_g.mul_(stash.share)
        values, losses = [], []
        for (ids, batch), random in zip(stash.batches, stash.record.random, strict=True):
            taken = stash.taken.pop(0) if stash.taken else None
            seen = self.curvature(batch, len(ids), random, of_g, products, taken)
            values.append(-seen.scores)
            losses.append(seen.loss)
            if seen.products is not None:
                adjoints[WEIGHTS] += seen.products
        self._compare(stash, torch.stack(losses))
        return torch.cat(values, 1)

    def _compare(self, stash: Stash, losses: Tensor) -> None:
        apart = (losses - stash.losses).abs() > 10 * tolerance_of(losses.dtype) * stash.losses.abs()
        if bool(apart.any()):
            raise InputError(
                f"step {stash.record.step}: the loss is {float(losses[apart][0]):.6g} where it is differentiated "
                f"twice, and {float(stash.losses[apart][0]):.6g} in the replay. Likely cause: dropout inside "
                "fused attention, whose kernel draws other random numbers than the one with second derivatives; train "
                "with dropout outside of it."
            )


def _blocks(span: Span, like: Tensor) -> Iterator[slice]:
    """The entries of a span, on a CPU in pieces that stay in its caches over the formulas' many operations."""
    size = max(BLOCK // len(like), 1) if like.device.type == "cpu" else span.stop - span.start
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))


def start_of(model: Module, flat: Flat, queries: Queries, loss: Loss) -> Tensor:
    """`[queries, P]`: the queries' gradients at the model's present weights, in evaluation mode.

    Raises:
        InputError: there is no query.
    """
    targets = targets_of(queries, loss)
    _, gradients = TargetPass(model, targets, flat.params).gradients()
    return flat.join_rows([gradients[p] for p in flat.params], len(targets))


def targets_of(queries: Queries, loss: Loss) -> dict[str, Target]:
    """Every query a target.

    Raises:
        InputError: there is none.
    """
    if isinstance(queries, Mapping):
        targets = dict(queries)
    else:
        targets = {f"query {i}": Target([batch], loss) for i, batch in enumerate(queries)}
    if not targets:
        raise InputError("adjoint(queries=[...]): there is no query; give at least one batch.")
    return targets


def clipping_of(trajectory: Trajectory, model: Module, clip: float | str | None = "recorded") -> Clipping:
    """What the caller says of the clipping, or what the run recorded.

    Raises:
        InputError: neither can be used.
    """
    if isinstance(clip, str):
        if clip != "recorded":
            raise InputError(
                f"adjoint(clip={clip!r}) is not known; give the largest norm, None, or 'recorded'."
            )
        return recorded_clipping(trajectory.records.values(), tolerance_of(next(model.parameters()).dtype))
    return Clipping(None if clip is None else float(clip))


def _chosen(trajectory: Trajectory, steps: Iterable[int] | None, last: int | None) -> frozenset[int]:
    """The steps that are valued.

    Raises:
        InputError: steps that the run does not have, or none.
    """
    known = range(trajectory.start, trajectory.end)
    chosen = set(known if steps is None else steps)
    unknown = sorted(chosen - set(known))
    if unknown:
        raise InputError(
            f"adjoint(steps=...): the run has no step {unknown[0]}; its steps are {known.start} to {known.stop - 1}; "
            "choose among them."
        )
    if last is not None:
        chosen &= set(known[-last:]) if last > 0 else set()
    if not chosen:
        raise InputError("adjoint(steps=..., last=...): no step is left to value; choose more of them.")
    return frozenset(chosen)


def _table(trajectory: Trajectory, values: Mapping[int, Tensor], queries: int) -> Tensor:
    """`[queries, rows]`, on the host; NaN for the steps that were not valued."""
    parts = []
    some = next(iter(values.values()), torch.zeros(queries, 0))
    for t, record in sorted(trajectory.records.items()):
        if not record.skipped:
            rows = sum(map(len, record.ids))
            empty = torch.full((queries, rows), float("nan"), dtype=some.dtype)
            parts.append(values[t].cpu() if t in values else empty)
    return torch.cat(parts, 1)
