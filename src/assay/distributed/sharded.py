"""`fully_shard` (FSDP2): every process holds a shard of each parameter, its gradient and its optimizer state.

What the methods keep (∇ℓ, K_t, the weights along a step) is held in shards as well. A sample's gradient is known
only where the sample is, and there it is whole: for the inner products the directions are gathered, one parameter
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from assay.capture import contract
from assay.capture.factors import Dense, Factors, Lookup, Outer
from assay.capture.held import number_of
from assay.capture.marks import Directions, Weight
from assay.distributed.group import Group
from assay.distributed.kinds import is_sharded
from assay.distributed.processes import local
from assay.distributed.shards import cut, gather, groups_of
from assay.errors import InputError
from assay.targets import Target, TargetPass, refuse_constant, undisturbed

__all__ = ["Sharded"]


class Sharded(Group):
    """A model under `fully_shard`.

    Args:
        module: the root.

    Raises:
        InputError: a layout of the parameters in which per-sample gradients cannot be followed.
    """

    kind = "fsdp2"
    sharded = True

    def __init__(self, module: Module) -> None:
        self.groups = groups_of(module)
        meshes = {group.mesh for group in self.groups}
        if len(meshes) != 1:
            raise InputError(
                "Run(model): fully_shard was applied with several meshes; use one for all modules."
            )
        (mesh,) = meshes
        world = dist.group.WORLD
        assert world is not None
        if mesh.size() != dist.get_world_size():
            raise InputError(
                f"Run(model): fully_shard's mesh has {mesh.size()} of the {dist.get_world_size()} processes; "
                "pipeline and tensor parallelism are not followed, so give it a mesh of all processes."
            )
        super().__init__(module, world, torch.device(self.groups[0].inner.device))
        self._shards = mesh.get_group(mesh.ndim - 1)  # the last dimension; a first one holds replicas

    def stand_ins(self) -> Mapping[Parameter, Tensor]:
        """The gathered parameters."""
        return {p: whole for group in self.groups for p, whole in group.whole.items()}

    def accumulated(self, params: Iterable[Parameter]) -> list[Tensor]:
        """Gradients that are reduced, and those that wait for it."""
        return super().accumulated(params) + [g for group in self.groups for g in group.unreduced()]

    @contextmanager
    def watching(self, carry_over: Callable[[Any, Any], None]) -> Iterator[None]:
        """What is known of a module's inputs survives the copies that `fully_shard` makes of them."""
        with ExitStack() as hooks:
            for module in self.module.modules():
                if is_sharded(module):
                    for hook in _around_inputs(module, carry_over):
                        hooks.callback(hook.remove)
            yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Backward passes inside reduce nothing and touch no gradient; whole parameters are given back after."""
        with ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group.reducing(False))
            try:
                yield
            finally:
                self.release()

    def release(self) -> None:
        """The next pass gathers the parameters anew."""
        for group in self.groups:
            group.release()

    def target_pass(self, targets: Mapping[str, Target], params: Sequence[Parameter]) -> TargetPass:
        """Each process takes its part of the batches; the backward pass adds up and cuts."""
        return ShardedTargetPass(self, targets, params)

    def reduced(self) -> bool:
        """Not under `set_requires_gradient_sync(False)`."""
        return all(group.reduces for group in self.groups)

    @property
    def share(self) -> float:
        """One over torch's divisor, by default the number of processes."""
        divisors = {group.divisor for group in self.groups}
        if len(divisors) != 1:
            raise InputError(
                f"Run(model): the modules divide their gradients by different numbers ({sorted(divisors)}); call "
                "set_gradient_divide_factor with one number on all of them."
            )
        return 1 / divisors.pop()

    def contract(self, kept: list[tuple[Weight, Factors]], directions: Directions, like: Tensor) -> Tensor:
        """`[groups, targets, B]`: kept gradients of this process's samples with directions held in shards.

        A score is linear in the directions, so they are gathered one parameter at a time, in the same order in every
        process whatever its samples used.
        """
        targets = number_of(directions)
        scores = like.new_zeros(like.shape[0], targets, like.shape[2])
        needed = self._values_needed(kept)
        for k, group in enumerate(self.groups):
            with ExitStack() as stack:
                for other in self.groups if needed[-1] else [group] * needed[k]:
                    stack.enter_context(other.gathered())
                for param in group.whole:
                    if param not in directions:
                        continue
                    whole = gather(directions[param], param)
                    # by identity: == of two tensors compares their entries
                    uses = [use for use in kept if any(p is param for p in use[0].params)]
                    if uses:
                        scores += contract(uses, _Alone(param, whole), like)
        return scores

    def _values_needed(self, kept: list[tuple[Weight, Factors]]) -> list[bool]:
        """Of which groups a contraction reads the weights, in any process; the last entry: of all at once."""
        place = {p: k for k, group in enumerate(self.groups) for p in group.whole}
        needed = torch.zeros(len(self.groups) + 1, device=self.device)
        for weight, factors in kept:
            if weight.derived or not isinstance(factors, (Dense, Outer, Lookup)):
                found = {place[p] for p in weight.params}
                needed[[*found]] = 1
                if len(found) > 1:
                    needed[-1] = 1
        return [x > 0 for x in self.total(needed).tolist()]

    def part(self, whole: Tensor, param: Parameter) -> Tensor:
        """The shard."""
        return cut(whole, param)

    def whole(self, x: Tensor) -> Tensor:
        """The sum over the shards."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._shards)
        return total


class _Alone(Mapping[Parameter, Tensor]):
    """Directions that are zero for all parameters but one."""

    def __init__(self, param: Parameter, direction: Tensor) -> None:
        self.param, self.direction = param, direction

    def __getitem__(self, param: Parameter) -> Tensor:
        if param is self.param:
            return self.direction
        return self.direction.new_zeros(self.direction.shape[0], *param.shape)

    def __iter__(self) -> Iterator[Parameter]:
        return iter([self.param])

    def __len__(self) -> int:
        return 1


class ShardedTargetPass(TargetPass):
    """The batches of each target dealt out to the processes; torch's backward pass reduces and shards.

    All processes run the same number of passes, since every pass gathers the parameters together: one that has no
    batch left repeats one with weight 0.
    """

    def __init__(self, group: Sharded, targets: Mapping[str, Target], params: Sequence[Parameter]) -> None:
        super().__init__(group.module, targets, params, group.precision)
        self.group = group

    def losses(self) -> Tensor:
        """`[targets]`: the targets' losses, no gradients."""
        self.group.release()
        with undisturbed(self.model), torch.no_grad():
            rows = [
                torch.stack(
                    [
                        weight * self._loss(name, target, batch).detach()
                        for batch, weight in self._dealt(target)
                    ]
                ).sum()
                for name, target in self.targets.items()
            ]
        self.group.release()
        return self._total(rows)

    def gradients(self) -> tuple[Tensor, dict[Parameter, Tensor]]:
        """`[targets]` losses and `{parameter: [targets, *local shape]}` shards of the gradients."""
        self.group.release()
        losses, rows = [], []
        with undisturbed(self.model), torch.enable_grad(), self._own_gradients():
            for name, target in self.targets.items():
                losses.append(self._backward(name, target))
                rows.append([self._taken(p) for p in self.params])
        self.group.release()
        return self._total(losses), {
            p: torch.stack(g) for p, g in zip(self.params, zip(*rows, strict=True), strict=True)
        }

    def pieces(self) -> Iterator[tuple[Tensor, dict[Parameter, Tensor]]]:
        """All at once: the processes compute them side by side."""
        yield self.gradients()

    def hessian_products(self, direction: Mapping[Parameter, Tensor]) -> dict[Parameter, Tensor]:
        """Refused: torch gives the gathered parameters back before a second derivative could read them."""
        raise InputError("fully_shard has no second derivatives; choose path='trapezoid'.")

    def _dealt(self, target: Target) -> Iterator[tuple[Any, float]]:
        """This process's batches with their weights, which are those of the mean."""
        count, size = len(target.batches), self.group.size
        for start in range(0, count, size):
            own = start + self.group.rank
            yield (target.batches[own], 1 / count) if own < count else (target.batches[start], 0.0)

    def _backward(self, name: str, target: Target) -> Tensor:
        total = self._nothing()
        for batch, weight in self._dealt(target):
            loss = self._loss(name, target, batch) * weight
            refuse_constant(name, loss)
            (loss / self.group.share).backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    def _taken(self, param: Parameter) -> Tensor:
        gradient, param.grad = param.grad, None
        return torch.zeros_like(local(param.detach())) if gradient is None else local(gradient)

    @contextmanager
    def _own_gradients(self) -> Iterator[None]:
        """`.grad` is empty inside and what it was afterwards; backward passes reduce."""
        every = [p for group in self.group.groups for p in group.whole]
        before = [p.grad for p in every]
        with ExitStack() as stack:
            for group in self.group.groups:
                stack.enter_context(group.reducing(True))
            for p in every:
                p.grad = None
            try:
                yield
            finally:
                for p, gradient in zip(every, before, strict=True):
                    p.grad = gradient

    def _total(self, rows: Sequence[Tensor]) -> Tensor:
        losses = torch.stack(list(rows))
        return self.group.total(losses.to(torch.promote_types(losses.dtype, torch.float32)))


def _around_inputs(module: Module, carry_over: Callable[[Any, Any], None]) -> list[Any]:
    """Hooks before and after torch's own, which hands the inputs on under new autograd nodes."""
    given: list[Any] = []

    def before(_: Module, args: Any, kwargs: Any) -> None:
        given.append((args, kwargs))

    def after(_: Module, args: Any, kwargs: Any) -> None:
        if given:
            carry_over(given.pop(), (args, kwargs))

    return [
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        module.register_forward_pre_hook(after, with_kwargs=True),
    ]
