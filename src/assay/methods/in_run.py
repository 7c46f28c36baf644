"""In-Run Data Shapley: what each example contributed to this very run (Wang et al., arXiv 2406.11011).

Step t moves the weights by Δ_t = −K_t Σ_i g_i + (momentum carried over, weight decay), with K_t the optimizer's own
diagonal. To first order (Section 4.1, "ghost dot-product"; `path="left"`) the value of sample i at step t is

    v_i = ∇ℓ_val(w_t)ᵀ K_t g_i            (positive: the sample lowered the target's loss)

and its value to the run is Σ_t v_i. The account of the step sets Σ_i v_i, the part carried over by momentum and the
part of the weight decay against the measured change ℓ_val(w_t) − ℓ_val(w_{t+1}).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from assay.capture import contract
from assay.errors import AssayWarning, InputError
from assay.methods.base import Context, Demand, MicroBatch
from assay.targets import Target, TargetPass

__all__ = ["InRunShapley"]

PATHS = ("left",)
MOMENTUM = ("instant",)


class InRunShapley:
    """First-order In-Run Data Shapley values of every sample for every target, computed while the model trains.

    Args:
        targets: name → `Target`, or one `Target` (named "target").
        path: the quadrature of the value's integral along the step; "left" is the paper's first order.
        momentum: "instant" credits a gradient's effect in its own step and books what momentum carries over to later
            steps on the account's line `carried`.

    Raises:
        InputError: an unknown choice, or no target.

    Example:
        >>> target = Target([None], lambda model, batch: model.weight.sum())
        >>> InRunShapley({"sum": target}).target_names
        ['sum']
    """

    def __init__(
        self,
        targets: Mapping[str, Target] | Target,
        path: str = "left",
        momentum: str = "instant",
    ) -> None:
        self.targets = {"target": targets} if isinstance(targets, Target) else dict(targets)
        if not self.targets:
            raise InputError(
                "InRunShapley(targets=...): there is no target; give at least one name → Target."
            )
        for name, target in self.targets.items():
            if not isinstance(target, Target):
                raise InputError(
                    f"InRunShapley: target {name!r} must be an assay.Target, not {type(target).__name__}."
                )
        self.path = _choice("path", path, PATHS)
        self.momentum = _choice("momentum", momentum, MOMENTUM)

    @property
    def target_names(self) -> list[str]:
        """The targets, in order."""
        return list(self.targets)

    def describe(self) -> Mapping[str, Any]:
        """The settings, for the run's information."""
        return {
            "method": "in-run shapley",
            "path": self.path,
            "momentum": self.momentum,
        }

    def attach(self, context: Context) -> InRunSession:
        """Start in a run."""
        return InRunSession(self, context)


def _choice(name: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise InputError(
            f"InRunShapley({name}={value!r}) is not known; choose one of {', '.join(map(repr, known))}."
        )
    return value


@dataclass
class _Booking:
    """One optimizer step, on its way to the ledger; tensors stay on the device until the next flush."""

    step: int
    ids: list[Sequence[int | str]]
    values: list[Tensor]  # per micro-batch, [targets, B]
    carried: Tensor  # [targets]
    decayed: Tensor  # [targets]
    before: Tensor  # [targets] losses at w_t
    gap: Tensor
    after: Tensor | None = None  # [targets] losses at w_{t+1}
    status: str = "ok"


class InRunSession:
    """`InRunShapley` at work in one run."""

    def __init__(self, method: InRunShapley, context: Context) -> None:
        self.method, self.context = method, context
        self.params = context.weights.params
        self.passes = TargetPass(context.model, method.targets, self.params)
        self.seconds = 0.0
        self._bookings: list[_Booking] = []
        self._explained = {name: [0.0, 0.0] for name in method.target_names}
        self._warned = False
        self._first = True

    # --- the step ---

    def begin_step(self, step: int) -> Demand:
        """Take ∇ℓ_val(w_t) and precondition it; it closes the account of the step before."""
        started = time.perf_counter()
        self.losses, self.left = self.passes.gradients()
        if self._first:
            self._check_losses()
        if self._bookings and self._bookings[-1].after is None:
            self._bookings[-1].after = self.losses
        demand = self._demand()
        self.seconds += time.perf_counter() - started
        return demand

    def _demand(self) -> Demand:
        """Directions K ∇ℓ_val where K is known before the backward pass; else the gradients are kept until it is.

        Adam's K_t contains the current gradient in v_t. The published shortcut, v_{t−1}, is off by up to 1/ε wherever
        an entry gets its first gradient (docs/decisions/0003).
        """
        if self.context.optimizer.preconditioned:
            return Demand(keep=self.params)
        gains = {param: self.context.optimizer.previous_gain(param) for param in self.params}
        return Demand({p: _times(self.left[p], gain) for p, gain in gains.items() if gain is not None})

    def before_update(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, gap: Tensor) -> None:
        """v_i = ∇ℓ_val(w_t)ᵀ K_t g_i for the step's samples, and the account's carried and decayed lines."""
        started = time.perf_counter()
        optimizer, left = self.context.optimizer, self.left
        carried, decayed = torch.zeros_like(self.losses), torch.zeros_like(self.losses)
        directions: dict[Parameter, Tensor] = {}
        for param in self.params:
            if param.grad is None:
                directions[param] = torch.zeros_like(left[param])
                continue
            split = optimizer.split(param)
            directions[param] = _times(left[param], split.gain)
            carried += _along(left[param], split.carried)
            decayed += _along(left[param], split.decayed)
        groups = range(scale.shape[0])
        factor = torch.stack([scale[g].to(batches[0].scores) * optimizer.lr(g) for g in groups])  # [groups]
        if not optimizer.preconditioned:  # a fused step() divides by the loss scale itself; `split` knows it
            factor = factor / optimizer.grad_scale()
        values = []
        for batch in batches:
            scores = (
                contract(batch.kept, directions, batch.scores) if optimizer.preconditioned else batch.scores
            )
            values.append(torch.einsum("g,gnb->nb", factor.to(scores), scores))
        ids = [batch.ids for batch in batches]
        self._bookings.append(_Booking(step, ids, values, carried, decayed, self.losses, gap))
        self.seconds += time.perf_counter() - started

    def skipped(self, step: int) -> None:
        """Nothing moved: an empty row that says so."""
        zero = torch.zeros_like(self.losses)
        gap = torch.zeros((), device=zero.device)
        self._bookings.append(_Booking(step, [], [], zero, zero, self.losses, gap, self.losses, "skipped"))

    def unattended_update(self) -> None:
        """Weights are about to move by a step that was not seen: measure the last one's effect now."""
        if self._bookings and self._bookings[-1].after is None:
            self._bookings[-1].after = self.passes.losses()

    # --- booking ---

    def close(self) -> None:
        """Measure the effect of the last step, and hand everything over."""
        self.unattended_update()
        self.flush()

    def flush(self) -> None:
        """Move what is complete to the host, in bulk, and to the ledger's writer."""
        done = [b for b in self._bookings if b.after is not None]
        for booking in done:
            self._write(booking)
        self._bookings = self._bookings[len(done) :]

    def _write(self, booking: _Booking) -> None:
        writer, names = self.context.writer, self.method.target_names
        predicted = torch.zeros(len(names), dtype=torch.float64)
        for micro, (ids, values) in enumerate(zip(booking.ids, booking.values, strict=True)):
            host = values.double().cpu()  # [targets, B]
            predicted += host.sum(1)
            writer.add_values(booking.step, micro, ids, host.t().numpy())
        assert booking.after is not None
        before, after, carried, decayed = (
            t.double().cpu() for t in (booking.before, booking.after, booking.carried, booking.decayed)
        )
        actual = before - after
        residual = actual - predicted - carried - decayed
        for n, name in enumerate(names):
            line = [float(t[n]) for t in (predicted, carried, decayed, actual, residual)]
            finite = all(abs(x) < float("inf") for x in line)
            status = booking.status if finite else "nan"
            writer.add_account(booking.step, name, line[0], line[1], line[2], line[3], line[4], status=status)
            if status == "ok":
                self._explained[name][0] += sum(line[:3])
                self._explained[name][1] += line[3]
        self._warn_if_not_a_scale(booking)

    def _warn_if_not_a_scale(self, booking: _Booking) -> None:
        if not self._warned and float(booking.gap) > 1e-3:
            self._warned = True
            warnings.warn(
                f"step {booking.step}: between backward() and optimizer.step() the gradient was changed by more than "
                "one factor per parameter group (clip_grad_value_, clipping layer by layer, added noise?); values "
                "assume a single factor, so see the account's residual.",
                AssayWarning,
                stacklevel=2,
            )

    def explained(self) -> Mapping[str, float]:
        """(Σ predicted + carried + decayed) / Σ actual, by target, over the steps written so far."""
        return {
            name: predicted / actual if actual else float("nan")
            for name, (predicted, actual) in self._explained.items()
        }

    def _check_losses(self) -> None:
        self._first = False
        for name, loss in zip(self.method.target_names, self.losses.tolist(), strict=True):
            if loss != loss or abs(loss) == float("inf"):
                raise InputError(
                    f"target {name!r}: its loss is {loss} at the first step, so nothing can be valued against it; "
                    "check its batches and its loss function."
                )


def _times(direction: Tensor, gain: Tensor | float) -> Tensor:
    """`[targets, *shape]`: K ⊙ ∇ℓ."""
    return direction if isinstance(gain, float) and gain == 1.0 else direction * gain


def _along(direction: Tensor, moved: Tensor | float) -> Tensor:
    """`[targets]`: ⟨∇ℓ_n, moved⟩."""
    if not isinstance(moved, Tensor):
        return direction.flatten(1).sum(1) * moved if moved else direction.new_zeros(direction.shape[0])
    return direction.flatten(1) @ moved.flatten()
