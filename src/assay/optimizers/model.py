"""What every optimizer model answers, and the part of the answer that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from assay.errors import CoverageError, InputError
from assay.optimizers.inputs import Group, Inputs, State
from assay.optimizers.scalars import Multiple, Scalar, number, squeezed, widened

__all__ = ["OptimizerModel", "Parts", "Split"]


@dataclass(frozen=True, eq=False)
class Split:
    """One parameter's coming step, by cause: ``w_t − w_{t+1} = lr·gain·grad + carried + decayed``.

    All three have the parameter's shape or are scalars. They are computed in the parameter's dtype, in
    float32 where that is float16 or bfloat16.

    Attributes:
        gain: Diagonal of K_t / lr, with the current gradient in the second moment. Its sign is negative
            under ``maximize=True``. Divided by the loss scale where ``step()`` itself unscales the gradient.
        carried: The part of the downward step that the momentum of earlier gradients causes.
        decayed: The part that the weight decay of this step causes, decoupled or L2. What L2 decay of
            earlier steps left in the momentum buffer is in ``carried``.
    """

    gain: Tensor | float
    carried: Tensor | float
    decayed: Tensor | float


@dataclass(frozen=True, eq=False)
class Parts:
    """A :class:`Split` whose parts are multiples of tensors that exist, as far as they can be.

    Attributes:
        gain: As in :class:`Split`.
        carried: As in :class:`Split`.
        decayed: As in :class:`Split`.
    """

    gain: Tensor | float
    carried: Tensor | Multiple | float
    decayed: Tensor | Multiple | float

    def written(self) -> Split:
        """Write the parts out."""
        carried, decayed = (
            part.written(self.gain) if isinstance(part, Multiple) else part
            for part in (self.carried, self.decayed)
        )
        return Split(self.gain, carried, decayed)


class OptimizerModel(ABC):
    """The step of one optimizer as a linear function of the gradient that ``step()`` receives.

    The second moment of Adam and its relatives contains the current gradient. Given that state K_t is
    a diagonal matrix, and the identity of :class:`Split` is exact. Hyper-parameters and state are read at
    every call and never changed, so schedules and restored checkpoints need no notice.

    No method waits for a device, except :meth:`momentum_decay` and :meth:`tail` where a β₁ is itself a
    tensor on a device.

    Attributes:
        optimizer: The ``torch.optim`` optimizer itself, out of any wrapper: the one whose
            ``register_step_pre_hook`` is called with the gradients that the update will use.
        preconditioned: Whether the gain contains the current gradient. If not, :meth:`previous_gain` is exact
            and never ``None``.
        elementwise: Whether an entry's step depends on that entry's gradient and state alone.
        buffer_is_preconditioned: How an earlier gradient acts through the buffer, see :meth:`tail`.
    """

    buffer_is_preconditioned: ClassVar[bool] = False
    preconditioned: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._index: dict[Tensor, int] = {}

    def params(self) -> list[Parameter]:
        """Return the optimizer's parameters in the order of its groups."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def group_index(self, param: Tensor) -> int:
        """Return the index of the parameter's group.

        Raises:
            InputError: The parameter is in no group.
        """
        if param not in self._index:  # a group may have been added since
            groups = self.optimizer.param_groups
            self._index = {p: i for i, group in enumerate(groups) for p in group["params"]}
        if param not in self._index:
            raise InputError(
                f"a parameter of shape {tuple(param.shape)} is in none of the "
                f"{len(self.optimizer.param_groups)} groups of {type(self.optimizer).__name__}: "
                "pass the optimizer that trains it"
            )
        return self._index[param]

    def lr(self, group_index: int) -> float | Tensor:
        """Return the group's learning rate as it stands now; a tensor stays one, with no dimension."""
        return squeezed(self.optimizer.param_groups[group_index]["lr"])

    def grad_scale(self) -> float | Tensor:
        """Return the loss scale by which ``step()`` itself divides the gradient, 1.0 if it does not.

        Fused optimizers do so under ``torch.amp.GradScaler``, which sets the scale only around ``step()``:
        read it in the step pre-hook. :meth:`split` contains it; :meth:`previous_gain` does not.
        """
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else number(scale)

    def overflowed(self) -> bool:
        """Return whether GradScaler found an overflow, so that a fused ``step()`` will do nothing.

        Other optimizers are not called then. Waits for the device, as the scaler itself does for those.
        """
        found = getattr(self.optimizer, "found_inf", None)
        return found is not None and bool(found)

    @torch.no_grad()
    def previous_gain(self, param: Tensor) -> Tensor | float | None:
        """Return the diagonal of K_t / lr as the state *before* the step foresees it.

        The second moment is taken as it stands, v_{t−1}, with the bias correction of its own step: exact
        if the coming gradient leaves the corrected moment unchanged. Entries whose gradients so far were
        zero or negligible (rows of rare tokens in an embedding) have v_{t−1} ≈ 0 and therefore a gain up
        to 1/ε, far above the one that the step will use: take :meth:`split` for such parameters.

        Returns:
            The gain, of the parameter's shape or a scalar; ``None`` where the state does not foresee it
            (the first step; the realised clipping of Adafactor) and only :meth:`split` can tell.
        """
        group = self._group(param)
        self._refuse_complex(param)
        gain = self._foreseen_gain(group, self._state(param))
        return None if gain is None else _signed(group, gain)

    @torch.no_grad()
    def split(self, param: Tensor, grad: Tensor | None = None) -> Split:
        """Return the parameter's coming step by cause, from inside the step pre-hook.

        Args:
            param: A parameter of the optimizer.
            grad: The gradient that ``step()`` will receive, of the parameter's shape; ``param.grad`` if
                left out. Without either the step passes over the parameter and all parts are zero.

        Raises:
            InputError: The parameter is in no group.
            CoverageError: The gradient is sparse or complex.
        """
        if grad is None and param.grad is None:
            self._group(param)  # which refuses a stranger
            return Split(0.0, 0.0, 0.0)
        return self.parts(self.inputs(param, grad)).written()

    def gain_at(self, param: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor | float:
        """Return the gain of :meth:`split` at some entries of a parameter.

        Only where ``elementwise``.

        Args:
            param: A parameter of the optimizer whose ``.grad`` is dense.
            read: Picks these entries out of a tensor of the parameter's shape.
        """
        return self.parts(self.inputs(param).at(read)).gain

    def inputs(self, param: Tensor, grad: Tensor | None = None) -> Inputs:
        """Return what the parameter's coming step is computed from.

        Args:
            param: A parameter of the optimizer.
            grad: As of :meth:`split`; ``param.grad`` if left out, which must then be there.

        Raises:
            InputError: The parameter is in no group.
            CoverageError: The gradient is sparse or complex.
        """
        group, grad = self._group(param), param.grad if grad is None else grad
        assert grad is not None
        self._refuse_what_has_no_split(param, grad)
        return Inputs(group, self._state(param), param.detach(), grad.detach())

    def parts(self, inputs: Inputs) -> Parts:
        """Return the step of :meth:`inputs`, or of some of their entries, by cause."""
        group, state, w, g = inputs.group, inputs.state, widened(inputs.w), widened(inputs.g)
        scale = self.grad_scale()
        scaled = isinstance(scale, Tensor) or scale != 1.0
        if scaled:
            g = g / scale
        weight_decay, decoupled = self._weight_decay(group)
        g = _signed(group, g)
        if not decoupled and not _is_zero(weight_decay):
            g = torch.add(g, weight_decay * w)
        gain, carried = self._linear(group, state, w, g)
        lr = squeezed(group["lr"])
        carried = carried.times(lr) if isinstance(carried, Multiple) else lr * carried
        decayed: Tensor | Multiple | float = 0.0
        if not _is_zero(weight_decay):
            decayed = Multiple(lr * weight_decay, w, gained=not decoupled)
        gain = _signed(group, gain)
        back: Scalar = _signed(group, 1.0)  # from the gain to ∂u/∂g, which the parts are made with
        if scaled:
            gain, back = gain / scale, back * scale
        if not _is_one(back):
            carried, decayed = (
                part.times(back) if isinstance(part, Multiple) and part.gained else part
                for part in (carried, decayed)
            )
        return Parts(gain, carried, decayed)

    def moves(self, param: Tensor) -> tuple[Tensor | Multiple | float, Tensor | Multiple | float]:
        """Return ``carried`` and ``decayed`` of :meth:`split`, as multiples of tensors that exist where they are."""
        split = self.split(param)
        return split.carried, split.decayed

    def couples_decay(self, param: Tensor) -> bool:
        """Return whether the weight decay is added to the gradient (L2), so that the momentum buffer holds it."""
        weight_decay, decoupled = self._weight_decay(self._group(param))
        return not decoupled and not _is_zero(weight_decay)

    def decay(self, param: Tensor) -> tuple[float, bool]:
        """Return the weight decay λ, and whether it is decoupled from the gradient."""
        weight_decay, decoupled = self._weight_decay(self._group(param))
        return float(weight_decay), decoupled

    def momentum_decay(self, param: Tensor) -> float:
        """Return β₁ (or μ), by which a gradient's weight shrinks from step to step; 0.0 without momentum."""
        return float(self._momentum(self._group(param)))

    def tail(self, param: Tensor, t: int, s: int) -> float:
        """Return κ_{t,s}, the weight with which the gradient of step s acts at step t ≥ s.

        Steps are the optimizer's own count for this parameter, from 1. The gradient g_s moves the weights
        at step t downwards by::

            lr_t · gain_t · κ_{t,s}/κ_{t,t} · g_s        (gain_t / κ_{t,t} is the preconditioner of step t)

        and summed over s < t this is ``carried`` of step t, if the momentum did not change meanwhile and
        there is no L2 decay. Where ``buffer_is_preconditioned`` is true (RMSprop) the buffer holds
        gradients that the preconditioner of their own step has passed: read gain_s / κ_{s,s} in place of
        gain_t / κ_{t,t}.

        Example:
            >>> import torch
            >>> from assay.optimizers import model_of
            >>> w = torch.nn.Parameter(torch.zeros(3))
            >>> model = model_of(torch.optim.SGD([w], lr=0.1, momentum=0.5, dampening=0.2))
            >>> model.tail(w, t=5, s=3), model.tail(w, t=5, s=1)  # the first gradient enters undamped
            (0.2, 0.0625)

        Raises:
            InputError: Not 1 ≤ s ≤ t.
        """
        if not 1 <= s <= t:
            raise InputError(
                f"tail(t={t}, s={s}): steps count from 1 and a gradient acts at t ≥ s only: give 1 ≤ s ≤ t"
            )
        return float(self._kappa(self._group(param), t, s))

    @abstractmethod
    def _linear(
        self, group: Group, state: State, w: Tensor, g: Tensor
    ) -> tuple[Tensor | float, Tensor | Multiple | float]:
        """Return (∂u/∂g, part of u due to the buffer) of the descent direction u, w_{t+1} = w_t − lr·u.

        ``g`` is the gradient as the optimizer's documentation writes it after the lines on ``maximize`` and
        weight decay, ``state`` the state before the step.
        """

    @abstractmethod
    def _foreseen_gain(self, group: Group, state: State) -> Tensor | float | None:
        """Return ∂u/∂g from the state alone."""

    def _momentum(self, group: Group) -> Scalar:
        return 0.0

    def _kappa(self, group: Group, t: int, s: int) -> Scalar:
        return float(t == s)

    def _weight_decay(self, group: Group) -> tuple[Scalar, bool]:
        """Return λ and whether it is decoupled from the gradient."""
        return number(group["weight_decay"]), False

    def _group(self, param: Tensor) -> Group:
        return self.optimizer.param_groups[self.group_index(param)]

    def _state(self, param: Tensor) -> State:
        state: State = self.optimizer.state.get(param, {})  # indexing would create the entry
        return state

    def _refuse_what_has_no_split(self, param: Tensor, grad: Tensor) -> None:
        self._refuse_complex(param)
        if grad.layout is not torch.strided:
            raise CoverageError(
                f"{self._name(param)} has a sparse gradient: build its embedding with sparse=False, "
                "or exclude it"
            )

    def _refuse_complex(self, param: Tensor) -> None:
        if param.is_complex():
            raise CoverageError(
                f"{self._name(param)} is complex, and so is its gradient: "
                "hold its real and imaginary parts as two parameters, or exclude it"
            )

    def _name(self, param: Tensor) -> str:
        index = self.group_index(param)
        group = self.optimizer.param_groups[index]
        place = next(i for i, p in enumerate(group["params"]) if p is param)
        names = group.get("param_names")  # torch keeps them if it was given named_parameters()
        which = f"parameter {names[place]!r}" if names else f"parameter {place} of group {index}"
        return f"{which} (shape {tuple(param.shape)})"


def _is_zero(x: Scalar) -> bool:
    return not isinstance(x, Tensor) and x == 0  # a tensor's value is not looked at: it may lie on a device


def _is_one(x: Scalar) -> bool:
    return not isinstance(x, Tensor) and x == 1


def _signed(group: Group, x: Any) -> Any:
    return -x if group.get("maximize", False) else x
