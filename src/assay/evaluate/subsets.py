"""Training on many subsets at once: the ground truth of the linear datamodeling score.

Each model is trained as if it had only its own examples: it averages the loss of a minibatch over those that it keeps
(`tsloo` drops terms and rescales nothing). All models of a block start alike and meet the examples in the same order;
`torch.func.vmap` makes their steps one batched computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import Module, Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from assay.errors import InputError
from assay.evaluate.cache import Cache
from assay.evaluate.fingerprint import called, fingerprint
from assay.evaluate.functional import State, check_functional, step
from assay.evaluate.intervals import Score, mean_with_interval
from assay.evaluate.lds import linear_datamodeling_score
from assay.workers import Local, Workers

__all__ = [
    "SubsetTraining",
    "SubsetTruth",
    "draw_subsets",
    "evaluate",
    "pick",
    "retrained_losses",
    "seeded",
    "subset_truth",
    "train_on_subsets",
]

Losses = Callable[[Any, Any], Tensor]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class SubsetTraining:
    """How every model is trained.

    Args:
        optimizer: `optimizer(parameters)` gives an SGD, Adam or AdamW of torch.optim, of which the options are read.
        epochs: passes over the training set.
        batch: rows of a minibatch, before those that a model leaves out.
        decay: whether the learning rate falls linearly, from the optimizer's to zero over the run.

    Raises:
        InputError: a size below 1.
    """

    optimizer: Callable[[Iterable[Parameter]], Optimizer]
    epochs: int = 10
    batch: int = 64
    decay: bool = True

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch) < 1:
            raise InputError("SubsetTraining(epochs, batch): both must be at least 1.")

    def rate(self, step: int, examples: int) -> float:
        """By what the learning rate of a step is multiplied."""
        return 1 - step / (self.epochs * -(-examples // self.batch)) if self.decay else 1.0


def draw_subsets(examples: int, number: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """`[number, examples]` bool: random subsets that keep that fraction of the examples.

    Example:
        >>> draw_subsets(10, 3, fraction=0.4).sum(1)
        tensor([4, 4, 4])
    """
    size = round(examples * fraction)
    if not 0 < size < examples:
        raise InputError(
            f"fraction={fraction} of {examples} examples keeps {size}: nothing to compare; "
            "choose a fraction between 0 and 1."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(number, examples, generator=generator).argsort(1)
    return torch.zeros(number, examples, dtype=torch.bool).scatter_(1, order[:, :size], True)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers from a seed inside; outside they go on as if nothing had been drawn.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(1)
        >>> with seeded(3):
        ...     assert torch.equal(torch.rand(1), first)
    """
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def train_on_subsets(
    make_model: Callable[[], Module],
    losses: Losses,
    data: Any,
    kept: Tensor,
    training: SubsetTraining,
    seed: int = 0,
) -> Weights:
    """Train one model per subset, all at once, each as if it had only its own examples.

    Args:
        make_model: gives a new model; called once, with torch's seed set to `seed`.
        losses: `losses(model, rows)` returns `[B]`, the loss of each row of a piece of `data`; it may call the model
            and nothing else of it.
        data: tensors, or a container of tensors, that share dimension 0.
        kept: `[S, N]` bool, the examples that each model is trained on.
        training: the settings.
        seed: of the weights and of the order of the examples.

    Returns:
        `{name: [S, *shape]}`: the trained parameters.

    Raises:
        InputError: `losses` gives no `[B]`, the sizes do not fit, or a batch norm would mix the rows of a minibatch.
        UnsupportedOptimizerError: the optimizer is none of the three.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> def losses(model, rows):
        ...     return torch.nn.functional.cross_entropy(model(rows[0]), rows[1], reduction="none")
        >>> sgd = SubsetTraining(lambda params: torch.optim.SGD(params, lr=0.1), batch=4)
        >>> found = train_on_subsets(lambda: torch.nn.Linear(3, 2), losses, (x, y), draw_subsets(8, 5), sgd)
        >>> found["weight"].shape
        torch.Size([5, 2, 3])
    """
    examples = _length(data)
    if kept.dim() != 2 or kept.shape[1] != examples:
        raise InputError(
            f"kept has shape {list(kept.shape)}: give [subsets, {examples}], a column per example."
        )
    with seeded(seed):
        model = make_model()
        orders = [torch.randperm(examples) for _ in range(training.epochs)]
    _check_norms(model)
    optimizer = training.optimizer(model.parameters())
    check_functional(optimizer)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    own = {name: groups[p] for name, p in model.named_parameters()}
    weights = {n: p.detach().expand(len(kept), *p.shape).clone() for n, p in model.named_parameters()}
    states: dict[str, State] = {name: {} for name in weights}
    slopes = vmap(grad(_mean_loss(model, losses)), in_dims=(0, None, 0))
    share = kept.to(next(iter(weights.values())).dtype)
    minibatches = [rows for order in orders for rows in torch.split(order, training.batch)]
    for t, rows in enumerate(minibatches):
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for batched weights
            gradients = slopes(weights, pick(data, rows), share[:, rows])
        for name, w in weights.items():
            lr = own[name]["lr"] * training.rate(t, examples)
            weights[name], states[name] = step(
                type(optimizer), own[name], lr, t + 1, w, gradients[name], states[name]
            )
    return weights


def evaluate(model: Module, weights: Weights, losses: Losses, queries: Any) -> Tensor:
    """`[S, Q]`: each model's loss on each query.

    Args:
        model: made as for the training, with the same seed: what it has beside its parameters (buffers drawn at random,
            the statistics of a batch norm in evaluation mode) is what the models were trained with.
        weights: the trained parameters, `{name: [S, *shape]}`.
        losses: `losses(model, rows)` returns `[Q]`.
        queries: what is asked.
    """
    plain: Callable[[Weights], Tensor] = lambda w: losses(_Called(model, w), queries)  # noqa: E731
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found: Tensor = vmap(plain)(weights)
    return found


@dataclass(frozen=True)
class SubsetTruth:
    """What retraining on subsets did to the queries.

    Args:
        kept: `[S, N]` bool, which examples each model was trained on.
        losses: `[S, Q]`, its loss on each query, averaged over the seeds.
    """

    kept: Tensor
    losses: Tensor

    def score(self, values: Tensor, seed: int = 0) -> Score:
        """The linear datamodeling score of an attribution, with its interval over the queries.

        Args:
            values: `[Q, N]`, positive where the example lowers the query's loss.
            seed: of the bootstrap.

        Raises:
            InputError: the sizes do not fit, or there are fewer than 3 subsets.

        Example:
            >>> kept = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 1]]).bool()
            >>> worth = torch.tensor([[3.0, 2.0, 1.0], [1.0, 5.0, 0.5]])
            >>> SubsetTruth(kept, -(kept.float() @ worth.t())).score(worth).per_query
            tensor([1., 1.], dtype=torch.float64)
        """
        if len(self.kept) < 3:
            raise InputError(f"{len(self.kept)} subsets cannot be ranked: retrain on at least 3.")
        return mean_with_interval(
            linear_datamodeling_score(values.cpu(), ~self.kept, self.losses.t()).nan_to_num(0), seed=seed
        )


def subset_truth(
    make_model: Callable[[], Module],
    losses: Losses,
    data: Any,
    queries: Any,
    training: SubsetTraining,
    *,
    kept: Tensor,
    seeds: Sequence[int] = (0,),
    cache: str | Path | None = None,
    at_once: int = 32,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
) -> SubsetTruth:
    """Retrain on every subset with every seed, and average the losses over the seeds; see `retrained_losses`."""
    found = retrained_losses(
        make_model, losses, data, queries, training,
        kept=kept, seeds=seeds, cache=cache, at_once=at_once, progress=progress, workers=workers,
    )  # fmt: skip
    return SubsetTruth(kept, found.mean(0))


def retrained_losses(
    make_model: Callable[[], Module],
    losses: Losses,
    data: Any,
    queries: Any,
    training: SubsetTraining,
    *,
    kept: Tensor,
    seeds: Sequence[int] = (0,),
    measure: Losses | None = None,
    cache: str | Path | None = None,
    at_once: int = 32,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers | None = None,
) -> Tensor:
    """Retrain on every subset with every seed; what a cache already holds is not done again.

    Args:
        make_model: gives a new model, the same whenever torch's seed is.
        losses: `losses(model, rows)` returns `[B]`.
        data: the training examples, tensors that share dimension 0.
        queries: the same of the queries.
        training: the settings.
        kept: `[S, N]` bool.
        seeds: of the retrainings.
        measure: `measure(model, rows)` returns `[B, …]`, what is asked of the retrained models; the losses if left out.
        cache: a folder that keeps each block of models; a killed call goes on there. None keeps nothing. It holds to
            one setting: to data, optimizer, subsets, the model as each seed makes it, and to what is called as far as
            `assay.evaluate.fingerprint.fingerprint` sees it.
        at_once: models that are trained together.
        progress: called with the number of models done and of all.
        workers: who retrain, a block at a time; this process alone if left out.

    Returns:
        `[seeds, S, Q, …]`, float64.

    Raises:
        InputError: as `train_on_subsets`.
        StoreError: the cache belongs to other data or settings, or cannot be written.
    """
    known = Cache(None, {})
    if cache is not None:
        setting = make_model, losses, data, queries, kept, training, at_once, measure or losses
        known = Cache(cache, _settings(*setting))
        for seed in seeds:
            known.agree(f"seed-{seed}", {"model": fingerprint(_made(make_model, seed))})
    blocks = [(seed, start) for seed in seeds for start in range(0, len(kept), at_once)]
    done = {block: known.read(_name(*block)) for block in blocks}
    tasks = (
        (make_model, losses, data, queries, kept[start : start + at_once], training, seed, measure)
        for (seed, start), found in done.items()
        if found is None
    )
    fresh = (workers or Local(1)).run(_retrained, tasks)
    parts: dict[int, list[Tensor]] = {seed: [] for seed in seeds}
    trained = 0
    for (seed, start), found in done.items():
        if found is None:
            found = next(fresh)
            known.write(_name(seed, start), found)
        parts[seed].append(found)
        trained += len(found)
        if progress is not None:
            progress(trained, len(seeds) * len(kept))
    return torch.stack([torch.cat(part) for part in parts.values()])


def _retrained(
    make_model: Callable[[], Module],
    losses: Losses,
    data: Any,
    queries: Any,
    kept: Tensor,
    training: SubsetTraining,
    seed: int,
    measure: Losses | None,
) -> Tensor:
    """`[S, Q, …]`: a block of subsets, trained on and asked."""
    weights = train_on_subsets(make_model, losses, data, kept, training, seed)
    return evaluate(_made(make_model, seed), weights, measure or losses, queries).double()


def _made(make_model: Callable[[], Module], seed: int) -> Module:
    """The model that the training with a seed starts from."""
    with seeded(seed):
        return make_model()


def _check_norms(model: Module) -> None:
    """Refuse what takes its statistics from a minibatch, of which a model is to see its own rows only."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise InputError(
                f"{name or 'the model'} ({type(module).__name__}) takes its statistics from whole minibatches, with "
                "the rows that are left out: call eval() on it in make_model, where it has running statistics, or take "
                "another norm."
            )


def _name(seed: int, start: int) -> str:
    return f"seed-{seed}-{start:06d}"


def pick(data: Any, rows: Tensor) -> Any:
    """The rows of every tensor of a container."""
    return tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, data)


class _Called:
    """A model with weights of its own, as far as calling it goes."""

    def __init__(self, model: Module, weights: Weights) -> None:
        self._model, self._weights = model, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, self._weights, args, kwargs)


def _mean_loss(model: Module, losses: Losses) -> Callable[[Weights, Any, Tensor], Tensor]:
    """The mean loss over the kept rows of a minibatch; 0 where none is kept."""

    def mean(weights: Weights, rows: Any, share: Tensor) -> Tensor:
        found = losses(_Called(model, weights), rows)
        if found.shape != share.shape:
            raise InputError(
                f"losses(model, rows) must return [{len(share)}], one loss per row, not {list(found.shape)}."
            )
        return (found * share).sum() / share.sum().clamp(min=1)

    return mean


def _length(data: Any) -> int:
    lengths = {len(x) for x in tree_leaves(data) if isinstance(x, Tensor)}
    if len(lengths) != 1:
        raise InputError(f"data: its tensors have {sorted(lengths)} rows; they must share dimension 0.")
    return lengths.pop()


def _settings(
    make_model: Callable[[], Module],
    losses: Losses,
    data: Any,
    queries: Any,
    kept: Tensor,
    training: SubsetTraining,
    at_once: int,
    measure: Losses,
) -> dict[str, Any]:
    """What the retrainings depend on beside the seed."""
    model = _made(make_model, 0)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = training.optimizer(model.parameters())
    groups = [
        {**group, "params": fingerprint([names.get(p) for p in group["params"]])}
        for group in optimizer.param_groups
    ]
    return {
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__} {groups}",
        "epochs": training.epochs,
        "batch": training.batch,
        "decay": training.decay,
        "at_once": at_once,
        "data": fingerprint(data),
        "queries": fingerprint(queries),
        "kept": fingerprint(kept),
        "make_model": called(make_model),
        "losses": called(losses),
        "measure": called(measure),
    }
