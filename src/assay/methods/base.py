"""What a method is to a run: it says what it wants of the capture, and books what comes back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture import Capture, Coverage, Weights
from assay.capture.factors import Factors
from assay.capture.marks import Directions, Weight
from assay.optimizers import OptimizerModel

if TYPE_CHECKING:
    from assay.distributed import OneProcess
    from assay.store import RunWriter

__all__ = ["Context", "Demand", "Method", "MicroBatch", "Retakes", "Session", "Settles", "Watch"]


def no_scaler() -> float | None:
    """The loss scale of a run that was given no scaler."""
    return None


@dataclass(frozen=True)
class Context:
    """What a run hands to its methods: model, weights and their uses, optimizer's step, ledger's writer, processes.

    `resumed` is the step at which a resumed run goes on; `loss_scale` tells by what a loss scaler multiplies the loss
    now, None where the run was given none.
    """

    model: Module
    weights: Weights
    coverage: Coverage
    optimizer: OptimizerModel
    writer: RunWriter
    processes: OneProcess
    resumed: int | None = None
    loss_scale: Callable[[], float | None] = no_scaler


class Watch(Protocol):
    """What a method looks at while one micro-batch runs; the method finds it again on the `MicroBatch`."""

    def close(self) -> None:
        """The micro-batch is over."""
        ...


@dataclass(frozen=True)
class Demand:
    """What a method wants of the capture in the coming micro-batch.

    Args:
        directions: `{parameter: [targets, *shape]}` for inner products with the per-sample gradients.
        keep: the parameters whose per-sample gradients are kept until the optimizer's step.
        rounded: what is kept may be held in bfloat16.
        by_token: what is kept can be taken apart by token.
        watch: called with the capture of each micro-batch; what it returns sees the backward pass as it runs.
        before: called before each micro-batch.
    """

    directions: Directions | None = None
    keep: Collection[Parameter] = ()
    watch: Callable[[Capture], Watch | None] | None = None
    rounded: bool = False
    by_token: bool = False
    before: Callable[[], None] | None = None

    @property
    def measures(self) -> bool:
        """Whether anything is wanted of the per-sample gradients."""
        return self.directions is not None or bool(self.keep) or self.watch is not None


@dataclass
class MicroBatch:
    """What the capture saw of one micro-batch.

    Args:
        ids: the user's ids of the samples.
        scores: `[groups, targets, B]` inner products, before the optimizer's scale.
        kept: the per-sample gradients that a method asked to keep, use by use.
        positions: T of the longest sequence in it, where tokens are followed.
        watch: what the method's `Demand.watch` returned.
        weights: `[B]`, what each sample's own loss was multiplied by in the loss; None if the user did not say.
    """

    ids: Sequence[int | str]
    scores: Tensor
    kept: list[tuple[Weight, Factors]] = field(default_factory=list)
    positions: int = 0
    watch: Watch | None = None
    weights: Tensor | None = None


class Session(Protocol):
    """A method at work in one run."""

    def begin_step(self, step: int) -> Demand:
        """Called before the first micro-batch of an optimizer step."""
        ...

    def before_update(self, step: int, batches: Sequence[MicroBatch], scale: Tensor, gap: Tensor) -> None:
        """Called when the gradient is as `optimizer.step()` will use it, the weights not yet moved.

        Args:
            step: number of the optimizer step.
            batches: its micro-batches.
            scale: `[groups]`, what the gradient was multiplied by since `backward()`.
            gap: 0-dim, how far that was from being a scale.
        """
        ...

    def skipped(self, step: int) -> None:
        """The step's gradients were thrown away (a loss scaler found an overflow): nothing moved."""
        ...

    def unattended_update(self) -> None:
        """Called before an optimizer step whose micro-batches the run did not see."""
        ...

    def flush(self) -> None:
        """Hand everything recorded so far to the writer."""
        ...

    def close(self) -> None:
        """The run ends: book what is open."""
        ...

    def explained(self) -> Mapping[str, float]:
        """Share of each target's change that the account explains so far."""
        ...

    seconds: float


@runtime_checkable
class Settles(Protocol):
    """A session that waits for the next step to value the last one."""

    def settle(self) -> None:
        """Value it now: a checkpoint is about to be saved."""
        ...


@runtime_checkable
class Retakes(Protocol):
    """A session whose targets' passes should run as the training's forward passes do."""

    def retake(self) -> Demand:
        """Take the first step's gradients again: only now is it known how that is."""
        ...


class Method(Protocol):
    """A method's settings; `attach` starts it in a run."""

    @property
    def target_names(self) -> Sequence[str]:
        """The columns of values that it writes."""
        ...

    def attach(self, context: Context) -> Session:
        """Start the method in a run."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Its settings, for the run's information."""
        ...
