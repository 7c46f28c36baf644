"""TRAK by its authors' library, `traker`, on one checkpoint, for any loss that is a negative log-probability.

The output function is the log-odds log(p / (1 − p)) with p = exp(−loss); for a text p is the geometric mean over its
tokens.

Source: Park et al., TRAK: Attributing Model Behavior at Scale, ICML 2023, arXiv 2303.14186, sections 2 and 3.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from assay.evaluate.baselines.base import require
from assay.evaluate.baselines.gradients import _inner, _Losses
from assay.evaluate.subsets import pick
from assay.evaluate.task import Task

__all__ = ["Trak"]

CHUNK = 50


@dataclass(frozen=True)
class Trak:
    """TRAK scores of the finished model.

    Args:
        dimension: of the random projection.
        seed: of it.
    """

    dimension: int = 512
    seed: int = 0
    name: str = "TRAK"

    def scores(self, task: Task) -> Tensor:
        """`[questions, N]`, in the library's scale."""
        trak, projectors = require("trak"), require("trak.projectors")
        model = task.trained.model
        entries = sum(p.numel() for p in model.parameters())
        projector = projectors.BasicProjector(
            entries, self.dimension, self.seed, projectors.ProjectionType.rademacher, torch.device("cpu"),
            block_size=-(-self.dimension // 4),  # a single block would be freed before the queries come
        )  # fmt: skip
        logging.disable(logging.WARNING)
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                warnings.catch_warnings(),
                redirect_stderr(StringIO()),
                sdpa_kernel(SDPBackend.MATH),
            ):
                warnings.simplefilter("ignore")  # of the library's own making
                tracer = trak.TRAKer(
                    model, _output(task), task.examples, folder, device="cpu", projector=projector,
                    proj_dim=self.dimension, use_half_precision=False, logging_level=logging.ERROR,
                )  # fmt: skip
                return task.merged(_run(tracer, task, model))
        finally:
            logging.disable(logging.NOTSET)


def _run(tracer: Any, task: Task, model: Module) -> Tensor:
    weights = model.state_dict()
    tracer.load_checkpoint(weights, model_id=0)
    for numbers, batch in task.batches(CHUNK):
        tracer.featurize(batch=tree_leaves(batch), num_samples=len(numbers))
    tracer.finalize_features()
    tracer.start_scoring_checkpoint("queries", weights, model_id=0, num_targets=task.asked)
    for rows in torch.split(torch.arange(task.asked), CHUNK):
        tracer.score(batch=tree_leaves(pick(task.queries, rows)), num_samples=len(rows))
    return torch.from_numpy(tracer.finalize_scores("queries").copy()).t().float()


def _output(task: Task) -> Any:
    """The task's loss as the library takes it."""
    _, spec = torch.utils._pytree.tree_flatten(task.data)
    base = require("trak.modelout_functions").AbstractModelOutput

    def losses(model: Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        rows = torch.utils._pytree.tree_unflatten(list(batch), spec)
        found: Tensor = functional_call(_Losses(model, task.losses), _inner({**weights, **buffers}), (rows,))
        return found

    class LogOdds(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()

        @staticmethod
        def get_output(model: Module, weights: Any, buffers: Any, *row: Tensor) -> Tensor:
            one = tree_map(lambda x: x[None], row)
            loss = losses(model, weights, buffers, one)[0]
            return -loss - torch.log(-torch.expm1(-loss.clamp(min=1e-6)))

        def get_out_to_loss_grad(self, model: Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return -torch.expm1(-losses(model, weights, buffers, batch)).detach().clone()[:, None]

    return LogOdds()
