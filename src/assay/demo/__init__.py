"""What ``assay demo`` trains: a corpus of seven domains, a small GPT, and its settings."""

from pathlib import Path

from assay.demo.gpt import GPT, IGNORED, GPTConfig

__all__ = ["CORPUS", "GPT", "IGNORED", "SETTINGS", "GPTConfig"]

CORPUS = Path(__file__).with_name("corpus.parquet")
"""The corpus, with the columns id, domain, source, license and text; ``DATA_CARD.md`` lies beside it."""

SETTINGS = Path(__file__).with_name("settings.yaml")
"""The configuration of the demo, as ``assay train`` reads it; only ``data.path`` and ``out`` are missing."""
