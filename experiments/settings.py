"""The settings of an experiment: a YAML file beside it, with smaller forms of the same experiment below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict

__all__ = ["Form", "Settings", "TextSettings", "read_settings"]

Form = Literal["full", "quick", "tiny"]
FORMS: tuple[str, ...] = get_args(Form)


class Settings(BaseModel):
    """What every experiment has; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: list[int]


class TextSettings(Settings):
    """What every experiment has that trains a small GPT."""

    vocabulary: int
    context: int
    layers: int
    heads: int
    width: int
    passes: int
    batch: int
    learning_rate: float


S = TypeVar("S", bound=Settings)


def read_settings(kind: type[S], file: Path, form: Form = "full") -> S:
    """Read the settings of one form: "full", or what `quick:` or `tiny:` of the file put in its place.

    Args:
        kind: the experiment's settings.
        file: its YAML.
        form: which form.

    Raises:
        pydantic.ValidationError: a key is unknown or missing, or its value cannot be used.
    """
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    changes = {name: content.pop(name, None) or {} for name in FORMS[1:]}
    return kind.model_validate(content | changes.get(form, {}))
