"""From a valued step to the rows of the ledger, and what its reader must be told."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import polars as pl
import torch
from torch import Tensor

from assay.errors import AssayWarning, StoreError
from assay.store import RunWriter
from assay.store.schema import rest_column, tokens_column

__all__ = ["Booking", "Books"]

Ids = Sequence[int | str]
SETTLED = 50  # steps before the explained share is judged
LATE = -1  # the micro-batch of values that momentum brought to a later step


@dataclass
class Booking:
    """One optimizer step, on its way to the ledger; tensors stay on the device until the next flush.

    Args:
        step: its number.
        before: `[targets]`, losses at w_t.
        gap: how far what the loop did to the gradient was from being a scale.
        ids: by micro-batch.
        values: by micro-batch, `[targets, B]`.
        tokens: by micro-batch, the values by token, `[targets, B, T + 1]`, where they are asked for.
        late: ids of earlier steps, and what reached them only now, `[targets, ids]`.
        elsewhere: `[targets]`, the sum of the values that other processes book for the same step.
        carried: `[targets]`, what the momentum of earlier gradients did and nobody was credited with.
        decayed: `[targets]`, what the weight decay did.
        points: of the quadrature.
        seconds: that the points between the ends took.
        met: whether the quadrature met its tolerance.
        after: `[targets]`, losses at w_{t+1}.
        status: of the account's row.
        joins: the account's row of a later step counts what this one says: its drop was measured over both.
        aged: of values by fresh and by aged gradients, where a step was valued by both.
    """

    step: int
    before: Tensor
    gap: Tensor
    ids: Sequence[Ids] = ()
    values: Sequence[Tensor] = ()
    tokens: Sequence[Tensor] = ()
    late: Sequence[tuple[Ids, Tensor]] = ()
    elsewhere: Tensor = field(default_factory=lambda: torch.zeros(()))
    carried: Tensor = field(default_factory=lambda: torch.zeros(()))
    decayed: Tensor = field(default_factory=lambda: torch.zeros(()))
    points: int = 0
    seconds: float = 0.0
    met: bool = True
    after: Tensor | None = None
    status: str = "ok"
    joins: bool = False
    aged: Aged | None = None


@dataclass(frozen=True)
class Aged:
    """One step valued by the fresh gradient and by the one that came before it.

    Args:
        age: by how many steps that one is older.
        fresh: by micro-batch, `[targets, B]`.
        stale: the same by the older one.
    """

    age: int
    fresh: Sequence[Tensor]
    stale: Sequence[Tensor]

    def rows(self, targets: Sequence[str]) -> Iterator[dict[str, float | str]]:
        """Of the table "refresh": target, age, both sums, and ‖stale − fresh‖ / ‖fresh‖ over the samples."""
        fresh, stale = (torch.cat(list(found), 1).double().cpu() for found in (self.fresh, self.stale))
        errors = (stale - fresh).norm(dim=1) / fresh.norm(dim=1)
        for n, name in enumerate(targets):
            sums = {"fresh": float(fresh[n].sum()), "stale": float(stale[n].sum())}
            yield {"target": name, "age": self.age, **sums, "error": float(errors[n])}


def token_columns(step: int, micro: int, targets: Sequence[str], values: Tensor) -> dict[str, pl.Series]:
    """The columns of the table "tokens" for one micro-batch's values by token `[targets, B, T + 1]`."""
    host = values.cpu().numpy()  # float32 or float64, as it was computed
    rows = host.shape[1]
    found = {"step": pl.repeat(step, rows, eager=True), "micro": pl.repeat(micro, rows, eager=True)}
    for name, per_target in zip(targets, host, strict=True):
        found[tokens_column(name)] = pl.Series(np.ascontiguousarray(per_target[:, :-1])).arr.to_list()
        found[rest_column(name)] = pl.Series(np.ascontiguousarray(per_target[:, -1]))
    return found


class Books:
    """Writes bookings to the ledger and watches how much of the losses' fall they explain.

    Args:
        writer: of the run.
        targets: their names.
        band: lowest and highest explained share that passes without a warning.
        path: the method's, for the warning's advice.
    """

    def __init__(
        self, writer: RunWriter, targets: Sequence[str], band: tuple[float, float], path: str
    ) -> None:
        self.writer, self.targets, self.band, self.path = writer, targets, band, path
        self._sums = {name: [0.0, 0.0, 0.0] for name in targets}  # explained, actual, |actual|
        self._steps = 0
        self._joined = torch.zeros(3, len(targets), dtype=torch.float64)  # predicted, carried, decayed
        self._told_gap = self._told_share = False
        self._recall()

    def _recall(self) -> None:
        """What the ledger of a resumed run holds already."""
        ledger = self.writer.ledger
        for name in self.targets:
            account = ledger.account(name)
            self._steps = len(account)
            ok = account.filter(account["status"] == "ok")
            explained = float((ok["predicted"] + ok["carried"] + ok["decayed"]).sum())
            self._sums[name] = [explained, float(ok["actual"].sum()), float(ok["actual"].abs().sum())]

    def write(self, bookings: Sequence[Booking]) -> None:
        """Move complete bookings to the host and to the writer.

        Raises:
            StoreError: the disk refused; the writer has taken every row all the same, and keeps it.
        """
        refused: StoreError | None = None
        for booking in bookings:
            for add in self._rows_of(booking):
                try:
                    add()
                except StoreError as error:
                    refused = refused or error
        if refused is not None:
            raise refused

    def _rows_of(self, booking: Booking) -> Iterator[Callable[[], None]]:
        """What is to be added to the writer, row group by row group."""
        assert booking.after is not None
        predicted = booking.elsewhere.double().cpu().expand(len(self.targets)).clone()
        for micro, (ids, values) in enumerate(zip(booking.ids, booking.values, strict=True)):
            host = values.double().cpu()  # [targets, B]
            predicted += host.sum(1)
            yield partial(self.writer.add_values, booking.step, micro, ids, host.t().numpy())
        for micro, (ids, tokens) in enumerate(zip(booking.ids, booking.tokens, strict=False)):
            columns = token_columns(booking.step, micro, self.targets, tokens)
            yield partial(self.writer.add_rows, "tokens", ids, columns)
        if booking.late:
            ids = [i for some, _ in booking.late for i in some]
            host = torch.cat([found for _, found in booking.late], 1).double().cpu()
            predicted += host.sum(1)
            yield partial(self.writer.add_values, booking.step, LATE, ids, host.t().numpy())
        before, after, carried, decayed = (
            t.double().cpu().expand(len(self.targets))
            for t in (booking.before, booking.after, booking.carried, booking.decayed)
        )
        self._steps += 1
        self._warn_of_gap(booking)
        if booking.aged is not None:
            for row in booking.aged.rows(self.targets):
                yield partial(self.writer.add_step, "refresh", booking.step, row)
        if booking.joins:
            self._joined += torch.stack([predicted, carried, decayed])
            return
        predicted, carried, decayed = torch.stack([predicted, carried, decayed]) + self._joined
        self._joined.zero_()
        actual = before - after
        residual = actual - predicted - carried - decayed
        for n, name in enumerate(self.targets):
            p, c, d, a, r = (float(t[n]) for t in (predicted, carried, decayed, actual, residual))
            status = booking.status if all(map(math.isfinite, (p, c, d, a, r))) else "nan"
            yield partial(self.writer.add_account, booking.step, name, p, c, d, a, r, status)
            if status == "ok":
                for i, x in enumerate((p + c + d, a, abs(a))):
                    self._sums[name][i] += x
        if booking.points:
            # Points are gradients along the step, both ends included; met says whether the tolerance was; the seconds
            # are those of the points between the ends, which come on top of the one gradient that any path takes.
            row = {"points": booking.points, "met": booking.met, "seconds": booking.seconds}
            yield partial(self.writer.add_step, "quadrature", booking.step, row)

    def explained(self) -> Mapping[str, float]:
        """(Σ predicted + carried + decayed) / Σ actual, by target, over the steps written so far."""
        return {name: e / a if a else math.nan for name, (e, a, _) in self._sums.items()}

    def warn_of_share(self) -> None:
        """Warn once where the explained share has left the band.

        Not in the first steps, nor of a loss that has gone up and down ten times as much as it has moved on the
        whole, whose share says nothing.
        """
        if self._told_share or self._steps < SETTLED:
            return
        for name, (explained, actual, moved) in self._sums.items():
            if abs(actual) <= 0.1 * moved or self.band[0] <= explained / actual <= self.band[1]:
                continue
            self._told_share = True
            higher = {"left": "path='trapezoid' or path='simpson'", "trapezoid": "path='simpson'"}
            advice = higher.get(self.path, "path='simpson'" if self.path == "hessian" else "a tolerance=0.02")
            warnings.warn(
                f"target {name!r}: after {self._steps} steps the account explains {explained / actual:.0%} of its "
                f"loss's change, outside {self.band[0]:.0%} to {self.band[1]:.0%}: the steps are too long for "
                f"path={self.path!r}; lower the learning rate, or take {advice}.",
                AssayWarning,
                stacklevel=2,
            )
            return

    def _warn_of_gap(self, booking: Booking) -> None:
        if not self._told_gap and float(booking.gap) > 1e-3:
            self._told_gap = True
            warnings.warn(
                f"step {booking.step}: between backward() and optimizer.step() the gradient was changed by more than "
                "one factor per parameter group (clip_grad_value_, clipping layer by layer, added noise?); values "
                "assume a single factor, so see the account's residual.",
                AssayWarning,
                stacklevel=2,
            )
