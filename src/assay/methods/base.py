"""What a method is to a run: it says what it wants of the capture, and books what comes back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture import Coverage, Weights
from assay.capture.factors import Factors
from assay.capture.marks import Directions, Weight
from assay.optimizers import OptimizerModel

if TYPE_CHECKING:
    from assay.store import RunWriter

__all__ = ["Context", "Demand", "Method", "MicroBatch", "Session"]


@dataclass(frozen=True)
class Context:
    """What a run hands to its methods: model, watched weights and their uses, optimizer's step, ledger's writer."""

    model: Module
    weights: Weights
    coverage: Coverage
    optimizer: OptimizerModel
    writer: RunWriter


@dataclass(frozen=True)
class Demand:
    """What a method wants of the capture in the coming micro-batch.

    Args:
        directions: `{parameter: [targets, *shape]}` for inner products with the per-sample gradients.
        keep: the parameters whose per-sample gradients are kept until the optimizer's step.
    """

    directions: Directions | None = None
    keep: Collection[Parameter] = ()


@dataclass
class MicroBatch:
    """What the capture saw of one micro-batch.

    Args:
        ids: the user's ids of the samples.
        scores: `[groups, targets, B]` inner products, before the optimizer's scale.
        kept: the per-sample gradients that a method asked to keep, use by use.
    """

    ids: Sequence[int | str]
    scores: Tensor
    kept: list[tuple[Weight, Factors]] = field(default_factory=list)


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
