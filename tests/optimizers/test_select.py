"""Which optimizers have a model, which wrappers are looked into, and what the refusals say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers.cases import OPTIONS
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer

from assay.errors import CoverageError, InputError, UnsupportedOptimizerError
from assay.optimizers import model_of
from assay.optimizers.pieces import pieces


class Lion(Optimizer):
    """Sign of the momentum: not linear in the gradient."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad.sign())


class Sophia(Lion):
    """Clips the preconditioned momentum entry by entry."""


class SAM(Lion):
    """Two gradients per step, the second at weights that were moved uphill."""


class MyLion(Lion):
    """Somebody's own, by inheritance."""


class Lookahead(Optimizer):
    """Holds an ``optimizer``, but does more than hand the step on."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})
        self.optimizer = optimizer


class Scheduled(Adam):
    """Leaves the step alone."""


class Projected(Adam):
    """Changes the step."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)


def weights(*shape: int) -> list[Parameter]:
    return [Parameter(torch.ones(*(shape or (2, 2))))]


REFUSED = {
    "Lion": lambda: Lion(weights()),
    "MyLion": lambda: MyLion(weights()),
    "Sophia": lambda: Sophia(weights()),
    "SAM": lambda: SAM(weights()),
    "Lookahead": lambda: Lookahead(Adam(weights())),
    "LBFGS": lambda: torch.optim.LBFGS(weights()),
    "Rprop": lambda: torch.optim.Rprop(weights()),
    "ASGD": lambda: torch.optim.ASGD(weights()),
    "SparseAdam": lambda: torch.optim.SparseAdam(weights()),
    "Adamax": lambda: torch.optim.Adamax(weights()),
    "Adadelta": lambda: torch.optim.Adadelta(weights()),
    "Muon": lambda: torch.optim.Muon(weights()),
}
REASONS = {
    "Lion": "it moves by the signs of its averages",
    "MyLion": "it moves by the signs of its averages",
    "Sophia": "it clips its update entry by entry",
    "SAM": "it takes the gradient at other weights than those that it moves",
    "LBFGS": "its direction comes from a history of steps",
    "Rprop": "it moves by the signs of its averages",
    "Muon": "it orthogonalises the momentum of a whole matrix",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    with pytest.raises(UnsupportedOptimizerError) as refusal:
        model_of(REFUSED[name]())
    message = str(refusal.value)
    assert (
        f".{name} has no linear model: {REASONS.get(name, 'its update is not linear in the gradient, or')}"
        in message
    )
    assert "SGD, Adam, AdamW, NAdam, RAdam, Adagrad, RMSprop, Adafactor" in message
    assert 'optimizer_model="sgd"' in message
    assert "\n" not in message


def test_every_supported_class_has_a_model() -> None:
    for kind in OPTIONS:
        w = weights()
        optimizer = kind(w, lr=0.1)
        model = model_of(optimizer)
        assert model.optimizer is optimizer
        assert model.params() == w
        assert model.lr(0) == 0.1


def test_subclasses() -> None:
    w = weights()
    w[0].grad = torch.ones(2, 2)
    plain, scheduled = Adam(w), Scheduled(w)
    wanted = model_of(plain).split(w[0]).gain
    assert torch.equal(torch.as_tensor(model_of(scheduled).split(w[0]).gain), torch.as_tensor(wanted))
    with pytest.raises(
        UnsupportedOptimizerError, match=r"Projected has no linear model: it overrides Adam\.step"
    ):
        model_of(Projected(w))


def test_override_is_plain_gradient_descent() -> None:
    w = weights()
    w[0].grad = torch.full((2, 2), 3.0)
    for optimizer in (Lion(w, lr=0.5), torch.optim.AdamW(w, lr=0.5, weight_decay=0.1)):
        model = model_of(optimizer, override="sgd")
        split = model.split(w[0])
        assert (split.gain, split.carried, split.decayed) == (1.0, 0.0, 0.0)
        assert model.previous_gain(w[0]) == 1.0
        assert (model.lr(0), model.momentum_decay(w[0]), model.tail(w[0], 3, 1)) == (0.5, 0.0, 0.0)
    assert model_of(SGD(w, lr=0.1, maximize=True), override="sgd").split(w[0]).gain == -1.0


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match=r"optimizer_model='adam' does not exist: \"sgd\" is the only one"):
        model_of(SGD(weights(), lr=0.1), override="adam")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Linear is not a torch\.optim\.Optimizer"):
        model_of(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(InputError, match='Lookahead has no "lr"'):
        model_of(Lookahead(SGD(weights(), lr=0.1)), override="sgd")


def test_a_stranger_among_the_parameters() -> None:
    model = model_of(SGD(weights(), lr=0.1))
    for ask in (model.split, model.previous_gain, model.group_index, model.momentum_decay):
        with pytest.raises(InputError, match=r"shape \(7,\) is in none of the 1 groups of SGD"):
            ask(Parameter(torch.ones(7)))


def test_sparse_gradient() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1, 3])).sum().backward()
    model = model_of(SGD(embedding.parameters(), lr=0.1))
    for ask in (model.split, lambda weight: next(pieces(model, [weight], 4))):
        with pytest.raises(
            CoverageError, match=r"parameter 0 of group 0 \(shape \(5, 2\)\) has a sparse gradient"
        ):
            ask(embedding.weight)


def test_complex_parameter_is_called_by_its_name() -> None:
    w = Parameter(torch.ones(3, dtype=torch.complex64))
    w.grad = torch.ones_like(w)
    model = model_of(Adam([("kernel", w)]))
    for ask in (model.split, model.previous_gain):
        with pytest.raises(CoverageError, match=r"parameter 'kernel' \(shape \(3,\)\) is complex"):
            ask(w)


def test_accelerate_is_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = Adam(weights())
    wrapped = accelerator.prepare_optimizer(optimizer)
    assert wrapped is not optimizer
    assert model_of(wrapped).optimizer is optimizer


def test_lightning_is_unwrapped() -> None:
    """Lightning's wrapper without Lightning: a class of that package and name with its ``optimizer``."""

    def optimizer_of(self: Any) -> Optimizer:
        return self._optimizer

    wrapper = type("LightningOptimizer", (), {"optimizer": property(optimizer_of)})
    wrapper.__module__ = "lightning.pytorch.core.optimizer"
    wrapped, optimizer = wrapper(), Adam(weights())
    wrapped._optimizer = optimizer
    assert model_of(wrapped).optimizer is optimizer
