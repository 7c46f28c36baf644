"""``assay train``: pretrain or fine-tune a causal language model and value every document of it."""

try:
    import pydantic as _pydantic  # noqa: F401
    import yaml as _yaml  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed: pip install 'assay[train]'") from error

from assay.train.config import Attribution, Config, Data, Model, Targets, Training, load_config
from assay.train.data import content_id, read_documents
from assay.train.loop import Progress, Result, train
from assay.train.tokenizer import learn_tokenizer

__all__ = [
    "Attribution",
    "Config",
    "Data",
    "Model",
    "Progress",
    "Result",
    "Targets",
    "Training",
    "content_id",
    "learn_tokenizer",
    "load_config",
    "read_documents",
    "train",
]
