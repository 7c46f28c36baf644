"""``assay train``: pretrain or fine-tune a causal language model and value every document of it."""

try:
    import pydantic as _pydantic  # noqa: F401
    import yaml as _yaml  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed: pip install 'assay[train]'") from error

from assay.train.again import Again, config_of, differences, id_column
from assay.train.config import Attribution, Config, Data, Model, Targets, Training, load_config, override
from assay.train.data import content_id, read_documents, read_rows
from assay.train.estimate import Estimate, estimate
from assay.train.loop import Progress, Result, train
from assay.train.tokenizer import learn_tokenizer

__all__ = [
    "Again",
    "Attribution",
    "Config",
    "Data",
    "Estimate",
    "Model",
    "Progress",
    "Result",
    "Targets",
    "Training",
    "config_of",
    "content_id",
    "differences",
    "estimate",
    "id_column",
    "learn_tokenizer",
    "load_config",
    "override",
    "read_documents",
    "read_rows",
    "train",
]
