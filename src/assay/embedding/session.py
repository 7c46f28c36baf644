"""`DataValueEmbedding` at work: what a training step leaves on the disk.

Projected gradients are formed in the backward pass, use by use. Where K is no multiple of the identity they must pass
the optimizer's diagonal before the projection, which is known only at the step: then the factored gradients are kept
until it, or of a projection with a support the little that it reads of them. Rows go to the disk in a thread of their
own; the queue to it is bounded, so that a slow disk slows training and fills no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture import Capture
from assay.capture.bottleneck import projected_through, refuse_uncovered, small_projected_twice, small_uses
from assay.capture.factors import Dense, Factors
from assay.capture.marks import Weight
from assay.capture.recorder import WHOLE
from assay.embedding.draws import logits_of, output_gradients
from assay.embedding.header import SCALARS, Header, write_header
from assay.embedding.hosted import Hosted
from assay.embedding.resume import recorded_before, save_through
from assay.embedding.sides import balanced, choose_sides
from assay.errors import AssayWarning, InputError, StoreError
from assay.methods.base import Context, Demand, MicroBatch
from assay.methods.momentum import Weigher, preconditioner, typical_size
from assay.methods.step import Step, read_step
from assay.projection import Projector
from assay.rows import RowWriter
from assay.rows.background import Background
from assay.rows.format import DTYPES
from assay.rows.sides import sides_crc

if TYPE_CHECKING:
    from assay.methods.embedding import DataValueEmbedding

__all__ = ["EmbeddingSession"]

COMMIT_BYTES = 4 << 20
UNSCALED = 2**-8  # below it, what multiplied the gradient was hardly clipping


@dataclass
class _Vector:
    """P x of one micro-batch, for x a gradient or a draw, and what P D x is formed of at the step.

    Args:
        rows: `[B, width]`, P x.
        kept: x by weight, of a draw; the run keeps the gradients.
        small: what the projections read of x by parameter, and of whose samples, where they have a support.
    """

    rows: Tensor
    kept: list[tuple[Weight, Factors]] = field(default_factory=list)
    small: list[tuple[Parameter, Factors, slice]] = field(default_factory=list)

    def clear(self) -> None:
        """Begin anew."""
        self.rows.zero_()
        self.kept.clear()
        self.small.clear()

    def keep(self, param: Parameter, read: Factors, part: slice) -> None:
        """Keep what is read of a use; written-out uses of one parameter by all samples are added up."""
        for other, known, whose in self.small:
            if (
                other is param
                and part == whose == WHOLE
                and isinstance(known, Dense)
                and isinstance(read, Dense)
            ):
                known.gradients.add_(read.gradients)
                return
        self.small.append((param, read, part))


class _Watch:
    """The projected gradients of one micro-batch as its backward pass runs, and the draws of its curvature."""

    def __init__(self, session: EmbeddingSession, capture: Capture, generator: torch.Generator) -> None:
        self.session, self.capture, self.generator = session, capture, generator
        self.gradient = _Vector(session.projector.empty(capture.batch))
        self.drawn: list[_Vector] = []
        capture.takes.append(self._taker(self.gradient, keep=False))
        capture.forgets.append(self._forget)
        self._hook = None
        if session.method.curvature == "ggn":
            capture.inseparable = "the draws of its curvature"
            self._hook = session.logits.register_forward_hook(self._see_logits)

    def close(self) -> None:
        """Let go of the module."""
        if self._hook is not None:
            self._hook.remove()

    def _forget(self) -> None:
        self.gradient.clear()
        self.drawn.clear()

    def _see_logits(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not self.capture.paused and torch.is_grad_enabled():
            logits = logits_of(output)
            if logits.requires_grad:
                logits.register_hook(lambda gradient: self._draw(logits, gradient))  # type: ignore[no-untyped-call]

    def _draw(self, logits: Tensor, gradient: Tensor) -> None:
        """In the backward pass, before it goes below the logits: go there with other gradients first."""
        if self.capture.looking is not None or self.capture.paused or self.capture.idle:
            return
        with torch._C.DisableTorchFunction():
            found = list(output_gradients(logits, gradient, self.session.method.draws, self.generator))
        for n, other in enumerate(found):
            if n == len(self.drawn):
                self.drawn.append(_Vector(self.session.projector.empty(self.capture.batch)))
            self.capture.look(logits, other, self._taker(self.drawn[n], self.session.preconditioned))

    def _taker(self, vector: _Vector, keep: bool) -> Any:
        session = self.session

        def take(weight: Weight, factors: Factors, part: slice = WHOLE) -> None:
            if session.small:  # both P x and P D x are formed of it, at the step
                for param, read in small_uses(weight, factors, session.projector.sides).items():
                    vector.keep(param, read, part)
                return
            if session.ready:
                session.projector.add(vector.rows, weight, factors, part)
            if keep:
                vector.kept.append((weight, self.capture.owned(factors)))

        return take


class EmbeddingSession:
    """`DataValueEmbedding` in one run."""

    def __init__(self, method: DataValueEmbedding, context: Context) -> None:
        self.method, self.context = method, context
        self.params = context.weights.params
        self.preconditioned = context.optimizer.preconditioned
        self.seconds = 0.0
        if context.processes.size > 1:
            raise InputError(
                "DataValueEmbedding records in one process, and this run has several: train in one, or leave it out."
            )
        self.folder = context.writer.gradients
        self._before = recorded_before(self.folder, method, context)
        if self._before is None:
            self.ranks, self.sides = choose_sides(method, context)
        else:
            self.ranks, self.sides = self._before.header.ranks, self._before.sides
        self.projector = Projector(context.weights, self.sides)
        self.through = self.projector.sides
        self.ready = not (self.preconditioned and method.projection.kind == "random")  # D is not known yet
        self.small = self.preconditioned and method.projection.support is not None
        if self._before is not None:
            self.through, self.ready = Projector(context.weights, self._before.through).sides, True
        self.logits = context.model
        if method.logits is not None:
            self.logits = context.model.get_submodule(method.logits)
        self._weigher = Weigher(context.optimizer, self.params)
        self._generator = torch.Generator()
        self._writer: RowWriter | None = None
        if self._before is not None:
            self._writer = self._rows_of_header(self._before.header, self._before.rows)
        self._background = Background(self._write, method.queue)
        self._background.__enter__()
        self._refused: StoreError | None = None
        self._not_finite = 0
        self._assumed, self._least, self._groups = False, 1.0, context.weights.number_of_groups

    # --- the step ---

    def begin_step(self, step: int) -> Demand:
        """Watch the backward pass; keep the gradients where the optimizer's diagonal is still to come."""
        # of each step its own, so that a resumed run draws what the unbroken one would have drawn
        self._generator.manual_seed((self.method.seed * 1_000_003 + step) % 2**63)
        keep = self.preconditioned and not self.small
        return Demand(keep=self.params if keep else (), watch=self._watch)

    def _watch(self, capture: Capture) -> _Watch:
        return _Watch(self, capture, self._generator)

    @torch.no_grad()
    def before_update(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, gap: Tensor) -> None:
        """Read K_t and hand the step's rows to the writer.

        Raises:
            CoverageError: a parameter whose gradients cannot be projected.
            StoreError: the disk refused; everything recorded is kept in memory and offered again.
        """
        refuse_uncovered(self.context.weights)
        read = read_step(
            self.context.optimizer,
            self.params,
            step,
            batches,
            scale,
            self.context.processes,
            reads=self._reads(),
        )
        read.counts = self._weigher.count()
        through = preconditioner(self.context.optimizer, read)
        if not self.ready:
            self._balance(batches, through)
        rows = torch.cat([self._rows_of(batch, through) for batch in batches])
        scalars, late, of_device = self._scalars(read, through)
        if self._writer is None:
            self._start(rows)
        ids = [i for batch in batches for i in batch.ids]
        counts = [len(batch.ids) for batch in batches]
        self._background.put(
            step, ids, counts, self._weights_of(batches, read), scalars, late, Hosted(of_device), Hosted(rows)
        )
        self._raise_refused()

    def _weights_of(self, batches: Sequence[MicroBatch], step: Step) -> Tensor:
        """`[samples]`, a: what each sample's loss was multiplied by, a loss scale included."""
        n, scale = sum(len(batch.ids) for batch in batches), self.context.loss_scale()
        if scale is None:
            scale = float(step.loss_scale)  # 1 but for fused optimizers
            self._assumed |= scale == 1 and any(batch.weights is None for batch in batches)
        parts = [torch.full((len(b.ids),), scale / n) if b.weights is None else b.weights for b in batches]
        return torch.cat(parts)

    def _balance(self, batches: Sequence[MicroBatch], through: Mapping[Parameter, Tensor | float]) -> None:
        """At the first step: weigh the projections by D, and project what was kept until D was known."""
        names = self.context.weights.names
        self.sides, inverse = balanced(self.sides, {names[p]: D for p, D in through.items()})
        self.projector = Projector(self.context.weights, self.sides)
        self.through = Projector(self.context.weights, inverse).sides
        self.ready = True
        for batch in batches:
            assert isinstance(batch.watch, _Watch)
            for vector in self._vectors(batch):
                for weight, factors in vector.kept:
                    self.projector.add(vector.rows, weight, factors)

    def _reads(self) -> dict[Parameter, Any] | None:
        """The entries at which D is needed; None where it is needed as a whole."""
        optimizer = self.context.optimizer
        couples = any(shrink and not decoupled for shrink, decoupled in map(optimizer.decay, self.params))
        if not (self.small and self.ready and optimizer.elementwise) or couples:
            return None
        return {p: sides.entries_of for p, sides in self.through.items()}

    def _vectors(self, batch: MicroBatch) -> list[_Vector]:
        """The gradient and the draws, with all that was kept of them."""
        watch = batch.watch
        assert isinstance(watch, _Watch)
        return [replace(watch.gradient, kept=batch.kept), *watch.drawn]

    def _rows_of(self, batch: MicroBatch, through: Mapping[Parameter, Tensor | float]) -> Tensor:
        """`[B, parts · width]`."""
        vectors = self._vectors(batch)
        if not self.preconditioned:
            return torch.cat([vector.rows for vector in vectors], 1)
        form = self._of_small if self.small else self._through
        return torch.cat([part for vector in vectors for part in form(vector, through)], 1)

    def _through(self, vector: _Vector, through: Mapping[Parameter, Tensor | float]) -> tuple[Tensor, Tensor]:
        """`[B, width]` each: P x and P D x."""
        rows = torch.zeros_like(vector.rows)
        for weight, factors in vector.kept:
            found = projected_through(weight, factors, self.through, through)
            for param, part in found.items():
                rows[:, self.projector.slices[param]] += part.flatten(1)
        return vector.rows, rows

    def _of_small(
        self, vector: _Vector, through: Mapping[Parameter, Tensor | float]
    ) -> tuple[Tensor, Tensor]:
        """The same of what the projections read."""
        rows = torch.zeros_like(vector.rows)
        for param, factors, part in vector.small:
            at = self.projector.slices[param]
            own, D = self.projector.sides[param], through.get(param, 0.0)
            plain, moved = small_projected_twice(factors, own, self.through[param], D)
            vector.rows[part, at] += plain.flatten(1)
            rows[part, at] += moved.flatten(1)
        return vector.rows, rows

    def _scalars(
        self, step: Step, through: Mapping[Parameter, Tensor | float]
    ) -> tuple[list[float], list[tuple[int, int]], Tensor]:
        """`[parameters · 7]`: what `recursion.Update` needs of the step besides its rows.

        Factors that only the device knows are left out; the other two results say which number lacks which of them.
        """
        optimizer, found = self.context.optimizer, list[float]()
        known: dict[tuple[int, int], tuple[float, float, float, float]] = {}
        late: list[tuple[int, int]] = []
        factors = [*(step.scale / step.loss_scale).unbind()]  # by group, then what the loop below adds
        for p in self.projector.slices:
            t = step.counts.get(p)
            if t is None or p not in step.gains:
                found += [0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]  # the step passes over it
                continue
            group, D = optimizer.group_index(p), through[p]
            if (group, t) not in known:
                kappa, lr = optimizer.tail(p, t, t), float(optimizer.lr(group))
                carry = optimizer.tail(p, t, t - 1) / kappa if t > 1 and kappa else 0.0
                known[group, t] = lr, kappa, carry, optimizer.momentum_decay(p)
            lr, kappa, carry, decay = known[group, t]
            shrink, decoupled = optimizer.decay(p)
            keep = 1 - lr * shrink if decoupled else 1.0
            pull = 0.0 if decoupled else shrink
            late.append((len(found) + SCALARS.index("scale"), group))
            if pull and isinstance(D, Tensor):
                late.append((len(found) + SCALARS.index("pull"), len(factors)))
                factors.append(typical_size(D, p).to(factors[0]))
            sign = float(D) if not self.preconditioned else 1.0  # -1 where the optimizer maximises
            found += [lr * kappa, sign, keep, carry, decay, pull, lr]
        return found, late, torch.stack(factors)

    def skipped(self, step: int) -> None:
        """Nothing moved."""

    def unattended_update(self) -> None:
        """The step counts for the momentum, and nothing is known of its curvature."""
        self._weigher.count()

    # --- the disk ---

    def _start(self, rows: Tensor) -> None:
        method, width = self.method, self.projector.width
        draws = rows.shape[1] // (width * (1 + self.preconditioned)) - 1
        shapes = {n: tuple(p.shape) for p, n in self.context.weights.names.items()}
        header = Header(
            method.projection, self.ranks, shapes, self.projector.layers, self.preconditioned, draws, method.dtype,
            sides_crc(self.sides),
        )  # fmt: skip
        if self.through is not self.projector.sides:
            names = self.context.weights.names
            save_through(
                self.folder, {names[p]: sides.to(torch.device("cpu")) for p, sides in self.through.items()}
            )
        write_header(self.folder, header, self.sides)
        self._writer = self._rows_of_header(header)

    def _rows_of_header(self, header: Header, keep: int | None = None) -> RowWriter:
        method, width = self.method, header.width
        blocks = [
            (part * width + layer.start, part * width + layer.stop)
            for part in range(header.parts)
            for layer in header.layers
        ]
        entries = header.parts * width
        shard = method.shard or max(64, COMMIT_BYTES // (entries * DTYPES[method.dtype].itemsize))
        return RowWriter(self.folder.below("rows"), entries, method.dtype, blocks, shard, keep=keep)

    def _write(
        self,
        step: int,
        ids: list[Any],
        counts: list[int],
        weights: Tensor,
        scalars: list[float],
        late: list[tuple[int, int]],
        of_device: Hosted,
        on_the_way: Hosted,
    ) -> None:
        """In the background: the table's lines and the rows. The first line of a step has its scalars."""
        n, rows, known = len(ids), on_the_way.wait(), of_device.wait()
        self._least = min([self._least, *known[: self._groups].abs().tolist()])
        factors = torch.where(known.isfinite(), known, 0.0).tolist()
        for place, factor in late:
            scalars[place] *= factors[factor]
        stored = rows.dtype if self.method.dtype == "int8" else DTYPES[self.method.dtype]
        finite = (rows.abs() <= torch.finfo(stored).max).all(1)
        if not bool(finite.all()):
            self._not_finite += int((~finite).sum())
            rows = torch.where(finite[:, None], rows, 0.0)
        table = pl.DataFrame(
            {
                "id": pl.Series(ids),
                "step": pl.Series([step] * n, dtype=pl.Int64),
                "micro": pl.Series(
                    [m for m, count in enumerate(counts) for _ in range(count)], dtype=pl.Int32
                ),
                "weight": pl.Series(weights.tolist(), dtype=pl.Float64),
                "of": pl.Series([n] * n, dtype=pl.Int32),
                "scalars": pl.Series([scalars, *[None] * (n - 1)], dtype=pl.List(pl.Float64)),
            }
        )
        assert self._writer is not None
        try:
            self._writer.append(table, rows)
        except StoreError as error:  # the writer has taken the rows, and offers them again
            self._refused = error

    def _raise_refused(self) -> None:
        refused, self._refused = self._refused, None
        if refused is not None:
            raise StoreError(
                f"{refused}; nothing recorded is lost: the rows wait in memory for the next step or close()"
            ) from refused

    def flush(self) -> None:
        """Rows reach the disk by themselves, a shard at a time."""

    def settle(self) -> None:
        """A checkpoint is about to be saved: everything that was recorded reaches the disk.

        Raises:
            StoreError: the disk refuses.
        """
        self._background.wait()
        self._raise_refused()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Wait for the disk, and commit what is left.

        Raises:
            StoreError: the disk refuses; close again once it does not.
        """
        background, self._background = self._background, Background(self._write)
        try:
            if background._thread.is_alive():
                background.__exit__(None, None, None)
        finally:
            if self._writer is not None:
                self._writer.close()
            self._warn()

    def _warn(self) -> None:
        """Of what the embeddings will not show."""
        if self._not_finite:
            warnings.warn(
                f"{self._not_finite} recorded gradients were not finite, or too large for rows of "
                f"{self.method.dtype!r}, and are stored as zeros: embeddings take these samples for ones that did "
                "nothing.",
                AssayWarning,
                stacklevel=2,
            )
            self._not_finite = 0
        if self._assumed and self._least < UNSCALED and self.method.curvature == "fisher":
            warnings.warn(
                f"between backward() and optimizer.step() the gradient was multiplied by as little as "
                f"{self._least:.2g}: if that undid a loss scale, embeddings with curvature='fisher' need to know it; "
                "pass Run(scaler=...), or the samples' weights to run.step().",
                AssayWarning,
                stacklevel=2,
            )
            self._assumed = False

    def explained(self) -> Mapping[str, float]:
        """There is no account."""
        return {}
