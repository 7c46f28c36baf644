"""Constants from outside of a step that have as many rows as a batch: they are no samples, whatever a batch's size."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from capture.test_refusals import Doubling
from torch import Tensor, nn

import assay
from assay.capture.outside import Outside

WIDTH, CLASSES, RATE = 6, 3, 0.1
MEAN, STD = (
    torch.linspace(-1, 1, WIDTH, dtype=torch.float64),
    torch.linspace(1, 2, WIDTH, dtype=torch.float64),
)
PROMPTS = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MASK = (torch.arange(4 * WIDTH).view(4, WIDTH) % 2).double()

Batch = tuple[Tensor, Tensor]
Forward = Callable[[nn.Module, Tensor], Tensor]


class Masked(nn.Module):
    """A mask on a weight, under a private name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self._mask = nn.Linear(WIDTH, 4), nn.Linear(4, CLASSES), MASK.clone()

    def mask(self) -> Tensor:
        return self._mask

    def forward(self, x: Tensor) -> Tensor:
        weight = self.inner.weight * self.mask()
        return self.outer(torch.tanh(F.linear(x, weight, self.inner.bias)))


class MaskedByClass(Masked):
    table = MASK.clone()

    def mask(self) -> Tensor:
        return self.table


class MaskedByModule(Masked):
    def mask(self) -> Tensor:
        return MASK


class Normalised(nn.Module):
    """Inputs by means and spreads that the script holds."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer((x - MEAN) / STD)


class Prompted(nn.Module):
    """Similarities to the features of fixed prompts, which are an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        return F.normalize(self.image(x), dim=-1) @ F.normalize(self.text(prompts), dim=-1).t() / 0.3


class PromptedAside(Prompted):
    """The same, with a use that only the fallback at the model's boundary can measure."""

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        return super().forward(Doubling.apply(x, self.image.weight).tanh() @ self.image.weight, prompts)


def prompted(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, PROMPTS)


def alone(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def of_each(
    run: assay.Run,
    model: nn.Module,
    forward: Forward,
    held: Batch,
    batch: Batch,
    given: Callable[[], Batch] | None = None,
) -> tuple[list[float], list[float]]:
    """The values of one step, and those by autograd one sample at a time; `given` makes the batch in the step."""
    params, (x, y) = list(model.parameters()), batch
    target = torch.autograd.grad(F.cross_entropy(forward(model, held[0]), held[1]), params)
    losses = F.cross_entropy(forward(model, x), y, reduction="none") / len(x)
    each = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    want = [RATE * sum(float((g * h).sum()) for g, h in zip(grads, target, strict=True)) for grads in each]
    ids = [f"{run.status().step}-{i}" for i in range(len(x))]
    with run.step(ids):
        inputs, labels = batch if given is None else given()
        F.cross_entropy(forward(model, inputs), labels).backward()
    updated(run)
    run.state_dict()  # everything up to here is valued
    found = {name: value for _, name, value in run.ledger.steps("t").rows()}
    return [found[name] for name in ids], want


def updated(run: assay.Run) -> None:
    run.optimizer.optimizer.step()
    run.optimizer.optimizer.zero_grad()


def started(model: nn.Module, forward: Forward, held: Batch, **options: Any) -> assay.Run:
    target = assay.Target([held], lambda m, b: F.cross_entropy(forward(m, b[0]), b[1]))
    method = assay.InRunShapley({"t": target}, **options)
    return assay.Run(model, torch.optim.SGD(model.parameters(), lr=RATE), methods=[method])


def drawn(rows: int) -> Batch:
    return torch.randn(rows, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (rows,))


def compare(
    make: Callable[[], nn.Module], forward: Forward, sizes: Sequence[int], **options: Any
) -> list[str]:
    torch.manual_seed(0)
    model, held = make().double(), drawn(9)
    with started(model, forward, held, **options) as run:
        for rows in sizes:
            got, want = of_each(run, model, forward, held, drawn(rows))
            assert got == pytest.approx(want, rel=1e-9, abs=1e-12), rows
        return run.coverage()["status"].to_list()


@pytest.mark.parametrize("make", [Masked, MaskedByClass, MaskedByModule])
@pytest.mark.parametrize("sizes", [(8, 4, 8, 4), (8, 1, 4)], ids=str)
def test_a_mask_with_as_many_rows_as_a_later_batch(
    make: Callable[[], nn.Module], sizes: Sequence[int]
) -> None:
    compare(make, alone, sizes)


@pytest.mark.parametrize("make", [Masked, MaskedByClass])
def test_what_modules_and_their_classes_hold_is_constant_from_the_first_batch_on(
    make: Callable[[], nn.Module],
) -> None:
    assert set(compare(make, alone, (4, 8, 4))) == {"exact"}  # without a fallback


def test_a_vector_with_as_many_entries_as_a_later_batch() -> None:
    compare(Normalised, alone, (8, 8, WIDTH, 8))


@pytest.mark.parametrize("make", [Prompted, PromptedAside])
def test_an_argument_with_as_many_rows_as_a_later_batch(make: Callable[[], nn.Module]) -> None:
    compare(make, prompted, (8, 5, 8, 5))


def test_an_argument_is_a_constant_where_the_forward_pass_is_taken_again() -> None:
    values = []
    for memory in ("keep", "recompute"):
        torch.manual_seed(0)
        model, held = Prompted().double(), drawn(9)
        with started(model, prompted, held, path="simpson", memory=memory) as run:
            for rows in (8, 5):
                x, y = drawn(rows)
                with run.step([f"{rows}-{i}" for i in range(rows)]):
                    F.cross_entropy(prompted(model, x), y).backward()
                updated(run)
        values.append(run.ledger.values("t").sort("id")["value"].to_list())
    assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-12)


def test_buffers_that_batches_are_written_into_go_on_being_samples() -> None:
    """Also where a smaller batch met them first, in the step."""
    torch.manual_seed(0)
    model, held, (room, labels) = nn.Linear(WIDTH, CLASSES).double(), drawn(9), drawn(8)
    with started(model, alone, held) as run:
        for rows in (5, 8, 5, 8):
            x, y = drawn(rows)
            room[:rows], labels[:rows] = x, y

            def given(n: int = rows) -> Batch:
                return (room, labels) if n == len(room) else (room[:n], labels[:n])

            got, want = of_each(run, model, alone, held, (x, y), given)
            assert got == pytest.approx(want, rel=1e-9)


def test_a_refusal_says_what_was_taken_for_samples() -> None:
    """A tensor that is new in each step has no first sight that would help."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.shift = nn.Linear(WIDTH, CLASSES), lambda: made[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x - self.shift())

    made = [MEAN.clone()]
    torch.manual_seed(0)
    model, held = Shifted().double(), drawn(9)
    with started(model, alone, held) as run:
        of_each(run, model, alone, held, drawn(8))
        made[0] = MEAN.clone()
        with pytest.raises(
            assay.CoverageError, match=rf"outer\.weight.*\[{WIDTH}\].*taken for samples.*buffer"
        ):
            of_each(run, model, alone, held, drawn(WIDTH))


def test_no_property_of_a_module_runs() -> None:
    class Asked(Masked):
        @property
        def _costly(self) -> Tensor:
            raise AssertionError("it ran")

    compare(Asked, alone, (8, 4))


def test_the_first_sight_holds_nothing_alive_and_of_nothing_else() -> None:
    outside, table = Outside(), torch.ones(4, 3)
    assert not outside.carries(table, 8)
    gone = weakref.ref(table)
    del table
    gc.collect()
    assert gone() is None
    assert all(outside.carries(torch.ones(4, 3), 4) for _ in range(100))  # their ids are those of the dead


def test_a_tensor_of_another_shape_is_another() -> None:
    outside, table = Outside(), torch.ones(4, 3)
    assert not outside.carries(table, 8)
    table.resize_(8, 3)
    assert outside.carries(table, 8)
