"""What the examples are valued for: named validation objectives, and their losses and gradients at given weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel

from assay.errors import InputError

__all__ = [
    "Precision",
    "Target",
    "TargetPass",
    "eagerly",
    "full_precision",
    "refuse_constant",
    "refuse_delayed_errors",
    "undisturbed",
    "without_reentrant_checkpoints",
]


class Target:
    """A validation objective: the mean over `batches` of `loss(model, batch)`.

    Any differentiable scalar of the model will do (a loss, a margin, a log-odds); a value is positive where an
    example made it fall, and is in its unit.

    Args:
        batches: the validation batches, the same at every step, whatever `loss` takes; read once into a list.
        loss: `loss(model, batch)` returns a scalar tensor with a gradient.

    Raises:
        InputError: there is no batch, or `loss` cannot be called.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> batch = (torch.ones(3, 2), torch.zeros(3, 1))
        >>> target = Target([batch], lambda m, b: torch.nn.functional.mse_loss(m(b[0]), b[1]))
        >>> len(target.batches)
        1
    """

    def __init__(self, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor]) -> None:
        if not callable(loss):
            raise InputError(
                f"Target(batches, loss): loss must be a function of (model, batch), not {loss!r}."
            )
        self.batches = list(batches)
        self.loss = loss
        if not self.batches:
            raise InputError("Target(batches, loss): there is no batch; give at least one validation batch.")


class Precision:
    """The autocast under which the training's forward passes run, for the targets' passes to run under as well.

    It is read where a forward pass begins: a loop may enter autocast inside of `run.step`, where nobody sees it sooner.

    Example:
        >>> precision, cpu = Precision(), torch.device("cpu")
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     precision.note(cpu)
        False
        >>> with precision.inside(cpu):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """

    def __init__(self) -> None:
        self._training: torch.dtype | None = None
        self._targets: torch.dtype | None = None

    def note(self, device: torch.device) -> bool:
        """A forward pass of the training begins; whether the last targets' pass ran as it does."""
        self._training = _autocast(device)
        return self._training == self._targets

    def around(self, device: torch.device) -> None:
        """Before a step: an autocast that is on already is that of what follows."""
        self._training = _autocast(device) or self._training

    @contextmanager
    def inside(self, device: torch.device) -> Iterator[None]:
        """The autocast of the training, where none is on already."""
        self._targets = _autocast(device) or self._training
        if self._targets is None:
            yield
            return
        # without its cache: a cast made here, perhaps without a graph, is not for a training pass around it
        with torch.autocast(device.type, self._targets, cache_enabled=False):
            yield


def _autocast(device: torch.device) -> torch.dtype | None:
    known = is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if known else None


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside, where the device knows of any.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.float32
    """
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()


class TargetPass:
    """Losses and gradients of all targets at the model's present weights, the training run undisturbed.

    Args:
        model: the model that is trained.
        targets: name → target.
        params: the parameters whose gradients are wanted.
        precision: of the training's forward passes.
    """

    def __init__(
        self,
        model: Module,
        targets: Mapping[str, Target],
        params: Sequence[Parameter],
        precision: Precision | None = None,
    ) -> None:
        self.model, self.targets, self.params = model, targets, list(params)
        self.precision = precision or Precision()
        self._twice = False  # whether the graph is known to be differentiable twice

    def losses(self) -> Tensor:
        """`[targets]`: the targets' losses, no gradients."""
        with undisturbed(self.model), torch.no_grad():
            return torch.stack([self._mean(name, target) for name, target in self.targets.items()])

    def gradients(self) -> tuple[Tensor, dict[Parameter, Tensor]]:
        """`[targets]` losses and `{parameter: [targets, *shape]}` gradients; zero where a target does not use one."""
        losses, rows = [], []
        with undisturbed(self.model), trainable(self.params), torch.enable_grad():
            for name, target in self.targets.items():
                loss, gradient = self._gradient(name, target)
                losses.append(loss)
                rows.append(gradient)
        stacked = {p: torch.stack(g) if len(g) > 1 else g[0][None] for p, g in zip(self.params, zip(*rows))}  # noqa: B905
        return torch.stack(losses), stacked

    def pieces(self) -> Iterator[tuple[Tensor, dict[Parameter, Tensor]]]:
        """`gradients` of one target after the other, for those who do not hold them as they come."""
        for name, target in self.targets.items():
            with undisturbed(self.model), trainable(self.params), torch.enable_grad():
                loss, gradient = self._gradient(name, target)
            named = {p: g[None] for p, g in zip(self.params, gradient, strict=True)}
            del (
                gradient
            )  # while this waits, the one who holds it in less memory lets go of one after the other
            yield loss[None], named

    def hessian_products(self, direction: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """`{parameter: [targets, *shape]}`: each target's Hessian times one direction, by differentiating twice.

        Raises:
            RuntimeError: an operation of the model has no second derivative; attention itself runs on a kernel
                that has one.
        """
        rows = []
        with (
            undisturbed(self.model),
            trainable(self.params),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            eagerly(),
        ):
            for name, target in self.targets.items():
                parts = [self._hessian_product(name, target, batch, direction) for batch in target.batches]
                rows.append([torch.stack(p).sum(0) for p in zip(*parts, strict=True)])
        return {p: torch.stack(g) for p, g in zip(self.params, zip(*rows, strict=True), strict=True)}

    def _hessian_product(
        self, name: str, target: Target, batch: Any, direction: Mapping[Parameter, Tensor]
    ) -> list[Tensor]:
        loss = self._loss(name, target, batch) / len(target.batches)
        found = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True)
        slopes = [
            (g * direction[p].to(g.dtype)).sum()
            for p, g in zip(self.params, found, strict=True)
            if g is not None and g.requires_grad and p in direction
        ]
        if not slopes:
            return [torch.zeros_like(p) for p in self.params]
        along = torch.stack(slopes).sum()
        if not self._twice:
            refuse_delayed_errors([along])
            self._twice = True
        curved = torch.autograd.grad(along, self.params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, curved, strict=True)]

    def _gradient(self, name: str, target: Target) -> tuple[Tensor, list[Tensor]]:
        """One batch at a time, so that only one graph is alive."""
        total: Tensor | None = None
        summed: list[Tensor] = []
        share = 1 / len(target.batches)
        for batch in self._batches(name, target):
            loss = self._loss(name, target, batch) * share
            refuse_constant(name, loss)
            found = torch.autograd.grad(loss, self.params, allow_unused=True)
            gradient = [
                torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)
            ]
            total = loss.detach() if total is None else total + loss.detach()
            summed = [a.add_(b) for a, b in zip(summed, gradient, strict=True)] if summed else gradient
        if total is None:
            return self._nothing(), [torch.zeros_like(p) for p in self.params]
        return total, summed

    def _mean(self, name: str, target: Target) -> Tensor:
        losses = [self._loss(name, target, batch).detach() for batch in self._batches(name, target)]
        share = len(losses) / len(target.batches)
        return torch.stack(losses).mean() * share if losses else self._nothing()

    def _batches(self, name: str, target: Target) -> Sequence[Any]:
        """Those that this process takes: all, where it is the only one."""
        return target.batches

    def _nothing(self) -> Tensor:
        """A loss of no batch."""
        some = self.params[0]
        return torch.zeros((), dtype=torch.promote_types(some.dtype, torch.float32), device=some.device)

    def _loss(self, name: str, target: Target, batch: Any) -> Tensor:
        with self.precision.inside(self.params[0].device):
            loss = target.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                f"target {name!r}: loss(model, batch) must return a scalar tensor, not {shape}; "
                "return its mean or its sum."
            )
        return loss.reshape(())


def refuse_constant(name: str, loss: Tensor) -> None:
    """Say that a target's loss has no gradient.

    Raises:
        InputError: it has none.
    """
    if not loss.requires_grad:
        raise InputError(
            f"target {name!r}: its loss does not depend on the model's parameters; "
            "compute it from the model's outputs."
        )


@contextmanager
def trainable(params: Sequence[Parameter]) -> Iterator[None]:
    """All of these take part in what is differentiated inside: one may have been frozen since its last step."""
    frozen = [p for p in params if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled models run eagerly inside: what a compiler makes cannot be differentiated twice."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def refuse_delayed_errors(roots: Sequence[Tensor]) -> None:
    """Raise what autograd would pass over in silence: an operation whose derivative was declared final.

    `once_differentiable` leaves a node that raises when it is run; asked for the gradient of given inputs, autograd
    does not run it, and returns a Hessian product that lacks the operation.
    """
    seen = set()
    open_nodes = [root.grad_fn for root in roots]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise NotImplementedError("an operation is marked once_differentiable")
        seen.add(node)
        open_nodes += [following for following, _ in node.next_functions]


@contextmanager
def undisturbed(model: Module) -> Iterator[None]:
    """Evaluation mode inside; modes, random-number state and autocast of the training run as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), without_reentrant_checkpoints():
        model.eval()
        try:
            yield
        finally:
            if modes[0][1]:
                model.train()  # for modules that do more than change a flag (cached attention biases, merged adapters)
            for module, mode in modes:
                module.training = mode


class _NonReentrant:
    """Stands in for `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return checkpointing.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Activation checkpoints of the other kind: the re-entrant one is incompatible with `torch.autograd.grad`."""
    original = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = _NonReentrant  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        checkpointing.CheckpointFunction = original  # type: ignore[misc]
