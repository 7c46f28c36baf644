"""Other libraries' attributions of the very same checkpoints; one that is not installed is left out with a line."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from assay.evaluate.intervals import mean_with_interval
from assay.evaluate.subsets import SubsetTruth
from experiments.index.common import Task, first


def compare_peers(task: Task, truth: SubsetTruth) -> list[dict[str, Any]]:
    """A row per method of each library: its score, averaged over the checkpoints query by query."""
    logging.disable(logging.WARNING)
    found = []
    for package, method, attribute in PEERS:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed: its row is left out (pip install {package})")
            continue
        row: dict[str, Any] = {"package": package, "version": version, "method": method}
        scores, seconds = [], 0.0
        try:
            for seed in task.checkpoints:
                model = task.checkpoint(seed)
                started = time.perf_counter()
                with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
                    warnings.simplefilter("ignore")
                    values = attribute(task, model, folder)  # [Q, N]
                seconds += (time.perf_counter() - started) / len(task.checkpoints)
                scores.append(truth.score(values.detach()).per_query)
        except Exception as error:  # theirs, of any kind: a row that says so, and the next library
            found.append({**row, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:160]})
            print(f"{package} {method} failed: {found[-1]['failed']}")
            continue
        score = mean_with_interval(torch.stack(scores).mean(0))
        row["seconds"] = seconds
        found.append({**row, "lds": score.mean, "low": score.low, "high": score.high})
        print(f"{package} {method}: {score.mean:.3f} in {seconds:.0f} s")
    return found


def dataset(data: Any) -> TensorDataset:
    """The same rows as a data set."""
    return TensorDataset(*((data,) if isinstance(data, Tensor) else data))


def kronfluence_ekfac(empirical: bool, damping: float | None) -> Callable[[Task, nn.Module, str], Tensor]:
    """Kronfluence's EKFAC; damping None is its heuristic, 0.1 × the mean eigenvalue of each layer."""

    def attribute(task: Task, model: nn.Module, folder: str) -> Tensor:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task as Base

        class Objective(Base):  # type: ignore[misc]
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                if not sample:
                    return task.losses(model, batch).sum()
                logits = model(batch[0])
                flat = logits.flatten(0, -2)
                drawn = torch.multinomial(flat.detach().softmax(-1), 1)[:, 0]
                loss = nn.functional.cross_entropy(flat, drawn, reduction="sum")
                return loss / (len(flat) // len(logits))  # a row of several positions is their mean

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return task.losses(model, batch).sum()

        torch.manual_seed(0)
        analyzer = Analyzer("a", prepare_model(model, Objective()), Objective(), cpu=True, output_dir=folder)
        settings = FactorArguments(strategy="ekfac", use_empirical_fisher=empirical)
        analyzer.fit_all_factors("f", dataset(task.data), per_device_batch_size=100, factor_args=settings)
        analyzer.compute_pairwise_scores(
            "s", "f", dataset(task.queries), dataset(task.data), per_device_query_batch_size=100,
            per_device_train_batch_size=100, score_args=ScoreArguments(damping_factor=damping),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"]  # type: ignore[no-any-return]

    return attribute


def dattri_task(task: Task, model: nn.Module) -> Any:
    """The checkpoint as dattri takes it."""
    from dattri.task import AttributionTask

    def loss(params: Any, data: Any) -> Tensor:
        x, y = data
        x = x.reshape(-1, *first(task.data).shape[1:])  # some methods hand over one row without a batch
        logits = torch.func.functional_call(model, params, (x,))
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


def loaders(task: Task) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training examples and queries, in order."""
    return DataLoader(dataset(task.data), 100), DataLoader(dataset(task.queries), 100)


def dattri_ekfac(damping: float) -> Callable[[Task, nn.Module, str], Tensor]:
    """EKFAC of dattri; its damping is absolute."""

    def attribute(task: Task, model: nn.Module, folder: str) -> Tensor:
        from dattri.algorithm.influence_function import IFAttributorEKFAC

        train, test = loaders(task)
        attributor = IFAttributorEKFAC(dattri_task(task, model), damping=damping)
        attributor.cache(train)
        return attributor.attribute(train, test).t()  # type: ignore[no-any-return]

    return attribute


def dattri_logra(damping: float | None) -> Callable[[Task, nn.Module, str], Tensor]:
    """LoGra of dattri: random projections of our rank, the empirical Fisher; damping in mean eigenvalues."""

    def attribute(task: Task, model: nn.Module, folder: str) -> Tensor:
        from dattri.algorithm.logra import LoGraAttributor
        from dattri.task import AttributionTask

        forward = model.forward

        def batched(x: Tensor) -> Tensor:
            """It looks at the layers with one row that has no batch dimension."""
            found: Tensor = forward(x if x.dim() == first(task.data).dim() else x[None])
            return found

        def loss(model: nn.Module, batch: Any, device: str) -> Tensor:
            return task.losses(model, batch).sum()

        model.forward = batched
        train, test = loaders(task)
        objective = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        attributor = LoGraAttributor(objective, proj_dim=task.rank**2, offload="none", damping=damping)
        attributor.cache(train)
        return attributor.attribute(train, test).t()  # type: ignore[no-any-return]

    return attribute


def trak(task: Task, model: nn.Module, folder: str) -> Tensor:
    """TRAK of one checkpoint with 512 projections, its own margin for an output."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    if not first(task.data).is_floating_point():
        raise NotImplementedError("its output function is that of an image classifier")
    entries = sum(p.numel() for p in model.parameters())
    projector = BasicProjector(entries, 512, 0, ProjectionType.rademacher, torch.device("cpu"))
    tracer = TRAKer(
        model, "image_classification", task.examples, folder, device="cpu", projector=projector, proj_dim=512,
        use_half_precision=False,
    )  # fmt: skip
    tracer.load_checkpoint(model.state_dict(), model_id=0)
    train, test = loaders(task)
    for batch in train:
        tracer.featurize(batch=batch, num_samples=len(first(batch)))
    tracer.finalize_features()
    tracer.start_scoring_checkpoint("q", model.state_dict(), model_id=0, num_targets=len(first(task.queries)))
    for batch in test:
        tracer.score(batch=batch, num_samples=len(first(batch)))
    return torch.from_numpy(tracer.finalize_scores("q").copy()).t().float()


Attribute = Callable[[Task, nn.Module, str], Tensor]
PEERS: list[tuple[str, str, Attribute]] = [
    ("kronfluence", "EKFAC, drawn labels, default damping 1e-8", kronfluence_ekfac(False, 1e-8)),
    ("kronfluence", "EKFAC, drawn labels, damping 0.1 × mean", kronfluence_ekfac(False, None)),
    ("kronfluence", "EKFAC, empirical Fisher, damping 0.1 × mean", kronfluence_ekfac(True, None)),
    ("dattri", "EKFAC, damping 1e-4", dattri_ekfac(1e-4)),
    ("dattri", "EKFAC, damping 1e-2", dattri_ekfac(1e-2)),
    ("dattri", "LoGra, default damping 1e-5 × mean", dattri_logra(None)),
    ("dattri", "LoGra, damping 0.1 × mean", dattri_logra(0.1)),
    ("traker", "TRAK, 1 checkpoint, 512 projections", trak),
]
