"""Data value embeddings after training: from a run's recorded gradients to answers (see `methods.embedding`)."""

from assay.embedding.embeddings import Embeddings

__all__ = ["Embeddings"]
