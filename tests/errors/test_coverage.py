"""Parameters that no rule covers, and those that are left out."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from errors.training import LOSS, Batch, Training, one_line
from reference.models import WithCube
from torch import Tensor, nn
from torch.optim import SGD

import assay


def test_uncovered_parameter_is_named() -> None:
    """Without the start-up check, which would have found a slower way for it."""
    with pytest.raises(assay.CoverageError, match="gain") as error:
        Training(model=WithCube().double(), check="off").step()
    message = one_line(error)
    assert "exclude" in message
    assert "inner" not in message


class ReturnsItsLoss(nn.Module):
    """A model that gives nothing per sample, so that nothing but the gradient itself can be checked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = WithCube()

    def forward(self, batch: Batch) -> Tensor:
        return LOSS(self.inner, batch)


def test_uncovered_parameter_of_a_model_that_returns_its_loss() -> None:
    with pytest.raises(assay.CoverageError, match="gain") as error:
        Training(model=ReturnsItsLoss().double(), target_loss=lambda m, b: m(b)).step(lambda m, b: m(b))
    one_line(error)


@pytest.mark.parametrize("check", ["first", "off"])
def test_uncovered_parameter_with_single_samples(check: str) -> None:
    training = Training(model=WithCube().double(), check=check)
    ids, batch = training.data[0][0]
    with (
        pytest.raises(assay.CoverageError, match="gain") as error,
        training.run.step(ids[:1]),
    ):
        LOSS(training.model, {name: x[:1] for name, x in batch.items()}).backward()
    one_line(error)


def test_exclude_leaves_the_parameter_out_and_says_so() -> None:
    """The rest is valued as if the parameter were frozen; coverage reports what is missing."""
    model, frozen = WithCube().double(), WithCube().double()
    frozen.load_state_dict(model.state_dict())
    frozen.gain.requires_grad_(False)
    excluded = Training(model=model, exclude=["gain"], build=lambda m: SGD(m.parameters(), lr=0.1))
    reference = Training(
        model=frozen, build=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    )
    excluded.step()
    reference.step()
    a, b = (t.close().steps("held_out")["value"].to_list() for t in (excluded, reference))
    assert a == pytest.approx(b, rel=1e-9)
    coverage = excluded.run.coverage()
    assert coverage.filter(coverage["parameter"] == "gain")["status"].to_list() == ["excluded"]


def test_exclude_a_parameter_that_does_not_exist() -> None:
    with pytest.raises(assay.InputError, match="exclude") as error:
        Training(exclude=["net.0.wieght"])
    assert "net.0.wieght" in one_line(error)


@pytest.mark.parametrize(
    "penalised",
    [
        lambda loss, weight: loss + 0.1 * weight.square().sum(),
        lambda loss, weight: loss * (1 + weight.norm()),
        lambda loss, weight: torch.stack([loss, weight.abs().mean()]).sum(),
    ],
    ids=["sum", "product", "stack"],
)
def test_regulariser_on_a_weight_is_named(penalised: Callable[[Tensor, Tensor], Tensor]) -> None:
    """λ|w|² in the loss belongs to no sample: refused by name, never shared out in silence."""

    def regularised(model: nn.Module, batch: Batch) -> Tensor:
        return penalised(LOSS(model, batch), model.get_parameter("net.0.weight"))

    with pytest.raises(assay.CoverageError, match=r"net\.0\.weight") as error:
        Training().step(regularised)
    assert "net.3" not in one_line(error)


def test_weights_used_through_their_data_are_noticed() -> None:
    """`.data` cuts the graph: `.grad` has nothing of that use, and neither may the values."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x @ self.inner.weight.data.t()  # type: ignore[no-any-return]

    class Copied(nn.Module):
        def __init__(self, cut: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Linear(7, 5).double()
            self.inner.load_state_dict(cut.get_submodule("inner").state_dict())
            self.still: Tensor
            self.register_buffer("still", self.inner.weight.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + x @ self.still.t()  # type: ignore[no-any-return]

    cut = Cut().double()
    copied = Copied(cut)
    a, b = Training(model=cut), Training(model=copied)
    a.step()
    b.step()
    first, second = (t.close().steps("held_out")["value"].to_list() for t in (a, b))
    assert first == pytest.approx(second, rel=1e-9)
