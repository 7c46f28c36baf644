"""Data value embeddings beside honest retraining."""
