"""Data value embeddings: what if this example had been left out at that step? (Wang et al., arXiv 2412.09538).

Leaving sample i out of step s alone changes the loss on a query z, to first order, by ∇ℓ(w_T, z)ᵀ E_s(i)
(positive: the sample lowered that loss), with the sample's *data value embedding* (section 4.1)

    E_s(i) = [∏_{k=s+1}^{T−1} (I − K_k H_k)] K_s g_i        K_k the optimizer's diagonal, H_k the curvature of step k.

Algorithm 1 goes back in time from M = 0 after the last step,

    E_i = (I − M) K_s g_i  for the samples i of step s;      M ← M + Σ_i E_i (g_i/a_i)ᵀ

for the empirical Fisher matrix H_s = Σ_i g_i g_iᵀ / a_i of a loss L = Σ_i a_i ℓ_i; with rows j of any other factored
curvature H_s = Σ_j j jᵀ, M ← M + Σ_j (I − M) K_s j jᵀ. Algorithm 2 (influence checkpointing, section 4.2) cuts the
run into K segments, goes through each from M = 0, and joins them: E = [∏_{m=K…k+1} (I − M_m)] E_local.

All in coordinates projected as in LoGra: K does not commute with the projection P, so that P g and P K g are both kept
where K is no multiple of the identity.

Momentum makes (w, n) the state, with n the buffer of preconditioned gradients, D the preconditioner and K = s D:

    n_t = β n_{t−1} + c D g_t        w_{t+1} = ρ w_t − s (c D g_t + k n_{t−1})

c is what the loop did to the gradient (clipping, loss scale), ρ = 1 − lr·λ the decoupled decay, k the weight of the
buffer (β for heavy ball and Adam). With A and B the derivatives of w_T by the state after step t and C = s A − B,

    E_i = c C D g_i        A ← ρ A − Σ_j c C D j jᵀ        B ← β B − s k A

which is Algorithm 1 with A = I − M where there is no momentum (docs/embeddings.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from assay.errors import InputError
from assay.methods.base import Context
from assay.projection import Projection
from assay.rows.format import DTYPES, RowDtype
from assay.targets import Target

if TYPE_CHECKING:
    from assay.embedding.session import EmbeddingSession

__all__ = ["Curvature", "DataValueEmbedding"]

Curvature = Literal["fisher", "ggn"]


class DataValueEmbedding:
    """Records projected per-sample gradients while the model trains, from which embeddings are made afterwards.

    `ledger.embeddings(...)` builds them, `ledger.value_for(...)` values samples for targets that training did not know.

    Args:
        projection: how gradients are made small; by default `Projection(rank=32)`, random. Principal axes keep more at
            half the rank: `Projection(rank=16, kind="pca")` with `axes`.
        ranks: other ranks for some parameters, by name.
        budget: numbers per gradient and sample, in place of a rank: the largest rank that keeps within them.
        axes: where `projection.kind` is "pca": examples and their loss, whose covariances at the first weights give the
            axes.
        curvature: "fisher" needs nothing more; "ggn" records the Gauss-Newton matrix of a softmax cross-entropy
            as well.
        draws: vectors per sample that stand for its Gauss-Newton matrix: random signs on its square root, unbiased for
            any number; "all" takes one per class, which is exact (models with one prediction per sample).
        logits: name of the module whose output are the logits; by default the model's own output, or its `.logits`.
        dtype: of the stored rows: "bf16", "fp16", "fp32", "fp64" or "int8".
        queue: steps that may wait for the disk before training does.
        shard: rows of one commit; by default about 4 MiB. A process that dies loses what is not committed.
        seed: of the draws.

    Raises:
        InputError: an argument that is not understood.

    Example:
        >>> DataValueEmbedding(Projection(rank=8), curvature="ggn", draws=2).describe()["draws"]
        2
    """

    resumes: ClassVar[bool] = True

    def __init__(
        self,
        projection: Projection | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        budget: int | None = None,
        axes: Target | None = None,
        curvature: Curvature = "fisher",
        draws: int | Literal["all"] = 1,
        logits: str | None = None,
        dtype: RowDtype = "bf16",
        queue: int = 16,
        shard: int | None = None,
        seed: int = 0,
    ) -> None:
        self.projection = projection or Projection(rank=32)
        if curvature not in get_args(Curvature):
            raise InputError(
                f"DataValueEmbedding(curvature={curvature!r}) is not known; choose 'fisher' or 'ggn'."
            )
        if dtype not in DTYPES:
            raise InputError(
                f"DataValueEmbedding(dtype={dtype!r}) is not known; choose one of {', '.join(map(repr, DTYPES))}."
            )
        if draws != "all" and not (isinstance(draws, int) and draws >= 1):
            raise InputError(
                f"DataValueEmbedding(draws={draws!r}) must be a whole number from 1 on, or 'all'."
            )
        for name, value in (("queue", queue), ("budget", budget), ("shard", shard)):
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise InputError(f"DataValueEmbedding({name}={value!r}) must be a whole number from 1 on.")
        if (self.projection.kind == "pca") != (axes is not None):
            raise InputError(
                "DataValueEmbedding(axes=Target(batches, loss)) belongs to Projection(kind='pca'): the axes are "
                "measured on these examples before training."
            )
        if budget is not None and self.projection.kind == "none":
            raise InputError(
                "DataValueEmbedding(budget=...) chooses a rank, and Projection(kind='none') has none; "
                "leave one of them out."
            )
        self.ranks, self.budget, self.axes = dict(ranks or {}), budget, axes
        self.curvature, self.draws, self.logits = curvature, draws, logits
        self.dtype, self.queue, self.shard, self.seed = dtype, queue, shard, seed

    @property
    def target_names(self) -> list[str]:
        """No columns of values."""
        return []

    def describe(self) -> Mapping[str, Any]:
        """The settings, for the run's information."""
        return {
            "method": "data value embedding",
            "projection": self.projection.kind,
            "rank": self.projection.rank,
            "support": self.projection.support,
            "budget": self.budget,
            "curvature": self.curvature,
            "draws": self.draws if self.curvature == "ggn" else 0,
            "dtype": self.dtype,
        }

    def attach(self, context: Context) -> EmbeddingSession:
        """Start in a run."""
        from assay.embedding.session import EmbeddingSession

        return EmbeddingSession(self, context)
