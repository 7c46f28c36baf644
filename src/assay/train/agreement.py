"""What the cheaper methods say of a run of ``assay train``, as far as it recorded what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from assay.errors import AssayError, InputError
from assay.index import Index
from assay.train.batches import Batch
from assay.train.config import Config
from assay.train.influence import pair
from assay.train.model import load_model, token_mean_loss

if TYPE_CHECKING:
    from assay import Target
    from assay.store import Ledger

__all__ = ["cheaper_methods"]

Queries = Sequence[Sequence[tuple[Tensor, Tensor]]]
EMBEDDINGS, INFLUENCE = "embeddings", "influence functions"


def cheaper_methods(
    ledger: Ledger, targets: Mapping[str, Target], said: Callable[[str], None] | None = None
) -> dict[str, Tensor]:
    """What embeddings and an index of the run say of the same targets, as `Ledger.agreement` takes it.

    Embeddings where the run recorded them, influence functions where the run's folder holds an index
    (`assay serve RUN --build-index`); what is not there is left out.

    Args:
        ledger: of a run made by ``assay train``.
        targets: the queries, in their order.
        said: called with a line on each method that could not be compared.
    """
    assert ledger.path is not None
    model, _ = load_model(Config(**ledger.info["config"]).model, ledger.path / "model")
    model.eval()
    queries = [[pair(batch) for batch in target.batches] for target in targets.values()]
    found: dict[str, Tensor] = {}
    for name, scores in ((EMBEDDINGS, _by_embeddings), (INFLUENCE, _by_index)):
        try:
            values = scores(ledger, model, queries)
        except AssayError as error:
            if said is not None:
                said(f"{name} are not compared: {error}")
            continue
        if values is not None:
            found[name] = values
    return found


def _by_embeddings(ledger: Ledger, model: Module, queries: Queries) -> Tensor | None:
    """`[targets, rows]`, rows as in `ledger.rows`; None where the run recorded no gradients."""
    if not Config(**ledger.info["config"]).attribution.embeddings:
        return None
    embeddings = ledger.embeddings()
    if not embeddings.rows.select("step", "id").equals(ledger.rows.select("step", "id")):
        raise InputError("the rows that they were recorded for are not those of the replay.")
    return torch.stack([embeddings.influence(model, q, _summed, reduction="sum").sum(0) for q in queries])


def _by_index(ledger: Ledger, model: Module, queries: Queries) -> Tensor | None:
    """`[targets, ids]`, ids as they first appear in `ledger.rows`; None where the run's folder has no index."""
    assert ledger.path is not None
    folder = ledger.path / "index"
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    index = Index.open(folder)
    order = {id_: n for n, id_ in enumerate(ledger.rows["id"].unique(maintain_order=True))}
    missing = sorted(set(order) - set(index.ids), key=str)
    if missing:
        raise InputError(f"the index in {folder} lacks {missing[0]!r} and {len(missing) - 1} more documents.")
    kept = [n for n, id_ in enumerate(index.ids) if id_ in order]
    place = torch.tensor([order[index.ids[n]] for n in kept])
    scores = torch.stack([index.influence(model, q, _summed).sum(0) for q in queries])
    return scores.new_zeros(len(queries), len(order)).index_add_(1, place, scores[:, kept])


def _summed(model: Module, batch: Any) -> Tensor:
    """The loss summed over the tokens, so that the rows of a target add up to what it is made of."""
    total: Tensor = token_mean_loss(model, Batch(*batch)) * (batch[1] >= 0).sum()
    return total
