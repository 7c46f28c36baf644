"""Which model belongs to an optimizer."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from assay.errors import InputError, UnsupportedOptimizerError
from assay.optimizers.adafactor import Adafactor
from assay.optimizers.adagrad import Adagrad
from assay.optimizers.adam import Adam
from assay.optimizers.gradient_descent import GradientDescent
from assay.optimizers.model import OptimizerModel
from assay.optimizers.nadam import NAdam
from assay.optimizers.radam import RAdam
from assay.optimizers.rmsprop import RMSprop
from assay.optimizers.sgd import SGD

__all__ = ["model_of", "unwrapped"]

_MODELS: dict[type[Optimizer], type[OptimizerModel]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: Adam,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
    torch.optim.Adagrad: Adagrad,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adafactor: Adafactor,
}

# Why a family has no linear model, by the names that its implementations go by.
_REASONS = {
    **dict.fromkeys(
        ("Muon", "SingleDeviceMuon", "MuonWithAuxAdam"), "it orthogonalises the momentum of a whole matrix"
    ),
    **dict.fromkeys(
        ("Lion", "SignSGD", "Signum", "Rprop"), "it moves by the signs of its averages, not by their size"
    ),
    **dict.fromkeys(("Sophia", "SophiaG", "SophiaH"), "it clips its update entry by entry"),
    **dict.fromkeys(
        ("SAM", "ASAM", "GSAM"), "it takes the gradient at other weights than those that it moves"
    ),
    "LBFGS": "its direction comes from a history of steps and gradients, its length from a line search",
}

# Wrappers that hand the step on unchanged, by package and class: they need not be installed. Others, such
# as Lookahead, also hold an `.optimizer` but change its step.
_WRAPPERS = {
    ("accelerate", "AcceleratedOptimizer"),
    ("lightning", "LightningOptimizer"),
    ("lightning", "_FabricOptimizer"),
    ("lightning_fabric", "_FabricOptimizer"),
    ("pytorch_lightning", "LightningOptimizer"),
}


def model_of(optimizer: Optimizer, override: Literal["sgd"] | None = None) -> OptimizerModel:
    """Return the linear model of the optimizer's own step.

    Supported are SGD, Adam, AdamW (both with AMSGrad), NAdam, RAdam, Adagrad, RMSprop and Adafactor of
    ``torch.optim``, with all their options, a subclass of theirs that leaves ``step`` alone, and each of them
    inside accelerate's and Lightning's wrapper.

    Args:
        optimizer: The optimizer that trains the model.
        override: ``"sgd"`` takes K = lr and no momentum or decay, whatever the optimizer does.

    Raises:
        UnsupportedOptimizerError: The update is not linear in the gradient, or unknown.
        InputError: Not an optimizer, or an override that does not exist.

    Example:
        >>> import torch
        >>> from assay.optimizers import model_of
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        >>> optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.5)
        >>> model, before = model_of(optimizer), w.detach().clone()
        >>> w.grad = torch.tensor([0.5, 2.0], dtype=torch.float64)
        >>> split = model.split(w)
        >>> optimizer.step()
        >>> split.gain, split.carried, split.decayed
        (tensor([2.0000, 0.5000], dtype=torch.float64), 0.0, tensor([ 0.0500, -0.1000], dtype=torch.float64))
        >>> lr = model.lr(model.group_index(w))
        >>> torch.allclose(before - w, lr * split.gain * w.grad + split.carried + split.decayed)
        True
    """
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"{type(optimizer).__name__} is not a torch.optim.Optimizer: pass the one that steps"
        )
    if override == "sgd":
        if not all("lr" in group for group in optimizer.param_groups):
            raise InputError(f'{type(optimizer).__name__} has no "lr" that optimizer_model="sgd" could use')
        return GradientDescent(optimizer)
    if override is not None:
        raise InputError(f'optimizer_model={override!r} does not exist: "sgd" is the only one')
    for base in type(optimizer).__mro__:
        if base in _MODELS:
            if _step_of(type(optimizer)) is not _step_of(base):
                raise _refusal(optimizer, f"it overrides {base.__name__}.step")
            return _MODELS[base](optimizer)
    known = [_REASONS[kind.__name__] for kind in type(optimizer).__mro__ if kind.__name__ in _REASONS]
    raise _refusal(
        optimizer, known[0] if known else "its update is not linear in the gradient, or not known here"
    )


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside accelerate's or Lightning's wrapper.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)])
        >>> unwrapped(optimizer) is optimizer
        True
    """
    kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(optimizer).__mro__}
    while kinds & _WRAPPERS:
        optimizer = optimizer.optimizer
        kinds = {(kind.__module__.split(".")[0], kind.__name__) for kind in type(optimizer).__mro__}
    return optimizer


def _step_of(kind: type[Optimizer]) -> object:
    return inspect.unwrap(kind.step)  # torch wraps the step of every class that is instantiated


def _refusal(optimizer: Optimizer, reason: str) -> UnsupportedOptimizerError:
    kind = type(optimizer)
    supported = ", ".join(known.__name__ for known in _MODELS)
    return UnsupportedOptimizerError(
        f"{kind.__module__}.{kind.__qualname__} has no linear model: {reason}. Supported are {supported} of "
        'torch.optim; optimizer_model="sgd" scores it as plain gradient descent all the same'
    )
