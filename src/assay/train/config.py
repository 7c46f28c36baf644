"""The configuration of ``assay train``: every key, its default, and what a wrong one is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from assay.errors import InputError

__all__ = ["Attribution", "Config", "Data", "Model", "Targets", "Training", "load_config", "override"]

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A mapping of the configuration; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where the documents come from.

    Attributes:
        path: a folder of text files (read recursively), a ``.jsonl`` or a ``.parquet`` file.
        dataset: the name of a Hugging Face data set, in place of ``path``.
        subset: the configuration of that data set, where it has several.
        split: the split of that data set.
        text: the column that holds the text.
        id: the column that names a document; without it a document is named by a hash of its text. Documents
            that share an id are valued together.
        limit: use only the first so many documents.
        long: what becomes of a document longer than ``model.context``: ``split`` trains on all of it in
            several rows whose values add up, ``cut`` on its beginning only.
    """

    path: Path | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    text: str = "text"
    id: str | None = None
    limit: Count | None = None
    long: Literal["split", "cut"] = "split"

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either data.path or data.dataset")
        return self


class Model(Section):
    """What is trained.

    Attributes:
        name: ``gpt`` for the built-in model, or a causal language model of the transformers library: a folder
            that ``save_pretrained`` wrote, or a name on the hub. Its weights are where training starts.
        context: longest row, in tokens.
        vocabulary: size of the byte-pair vocabulary learned from the training text (``gpt`` only).
        layers: number of blocks (``gpt`` only).
        heads: attention heads per block (``gpt`` only).
        width: size of the residual stream (``gpt`` only).
    """

    name: str = "gpt"
    context: Annotated[int, Field(ge=2)] = 384
    vocabulary: Annotated[int, Field(ge=257)] = 4096  # 256 bytes and the end of a document
    layers: Count = 4
    heads: Count = 4
    width: Count = 128

    @model_validator(mode="after")
    def _fits(self) -> Model:
        sizes = sorted(self.model_fields_set & {"vocabulary", "layers", "heads", "width"})
        if self.name != "gpt" and sizes:
            raise ValueError(f"model.{sizes[0]} belongs to the built-in model; {self.name!r} brings its own")
        if self.width % self.heads:
            raise ValueError(f"model.width {self.width} is not a multiple of model.heads {self.heads}")
        return self


class Targets(Section):
    """What the documents are valued for: held-out text, by name, on which nothing is trained.

    Attributes:
        by: a column of the data; each of its values becomes a target. Without it there is one, ``held_out``.
        values: only these values of the column.
        documents: documents held out for each target. All of them are run through the model at every step, so
            their number and length decide what the values cost.
        tokens: use only so many tokens of each held-out document, at its beginning; ``model.context`` if null.
        files: text of your own in place of held-out documents, as ``name: path``; read like ``data.path``.
    """

    by: str | None = None
    values: list[str] | None = None
    documents: Count = 8
    tokens: Annotated[int, Field(ge=2)] | None = None
    files: dict[str, Path] = {}

    @model_validator(mode="after")
    def _values_of_a_column(self) -> Targets:
        if self.values is not None and self.by is None:
            raise ValueError("targets.values needs targets.by, the column whose values they are")
        if self.files and self.by is not None:
            raise ValueError("give either targets.by or targets.files")
        return self


class Training(Section):
    """How the model is trained: AdamW, linear warm-up, cosine decay, clipping.

    Attributes:
        epochs: passes over the documents.
        steps: stop after so many optimizer steps, if that comes first.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of one optimizer step.
        learning_rate: its peak.
        final_learning_rate: where the cosine ends, as a fraction of the peak.
        warmup: fraction of the steps over which the learning rate rises.
        weight_decay: AdamW's decoupled decay, for matrices and embeddings; none for biases and norms.
        betas: AdamW's decay rates of the first and second moment.
        clip: largest norm of the gradient; null turns clipping off.
    """

    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 16
    accumulate: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    final_learning_rate: Fraction = 0.1
    warmup: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: Annotated[float, Field(gt=0)] | None = 1.0


class Attribution(Section):
    """How values are computed; see :class:`assay.InRunShapley` for the choices.

    Attributes:
        path: quadrature of the path integral.
        momentum: what becomes of the part of an update that earlier steps caused.
        refresh: take the held-out gradients anew every so many steps only; the account then has a row per block.
        target_gradient: how the held-out gradients are held, each of them a copy of the weights: ``full``, ``bfloat16``
            (half the memory), ``cpu`` (in host memory) or ``factors`` (exact; smaller for few held-out tokens).
        tolerance: refine the quadrature of a step until it explains the step's change up to this share.
        measure_every: compare with a plain step once in so many steps; 0 turns the comparison off.
        granularity: ``token`` also takes every value apart by token, which the report shows in the texts; documents
            are then to be cut (``data.long``).
        snapshots: take snapshots for ``assay adjoint``: ``auto``, the number of steps between two, or a budget such as
            ``2 GB``.
        embeddings: also record what `assay influence` needs (:class:`assay.DataValueEmbedding`), and take snapshots.
        rank: of its projections.
        ranks: other ranks for some parameters, by name: ``{"token.weight": 128}``.
        support: read only so many coordinates of the wider sides of a weight (:class:`assay.Projection`): faster, and
            less exact; at least the rank.
        curvature: ``fisher``, or ``ggn`` to record the Gauss-Newton matrix as well.
    """

    path: str = "left"
    momentum: str = "instant"
    refresh: Annotated[int, Field(ge=1)] = 1
    target_gradient: Literal["full", "bfloat16", "cpu", "factors"] = "full"
    tolerance: Annotated[float, Field(gt=0)] | None = None
    measure_every: Annotated[int, Field(ge=0)] = 40
    granularity: Literal["sample", "token"] = "sample"
    snapshots: Annotated[int, Field(ge=1)] | str | None = None
    embeddings: bool = False
    rank: Count = 32
    ranks: dict[str, Count] = {}
    support: Count | None = None
    curvature: Literal["fisher", "ggn"] = "fisher"


class Config(Section):
    """The whole configuration.

    Attributes:
        out: the run folder; it must not hold a run already.
        seed: of the weights, the order of the documents and the choice of the held-out ones.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        data: where the documents come from.
        model: what is trained.
        targets: what the documents are valued for.
        train: how the model is trained.
        attribution: how values are computed.

    Example:
        >>> Config(out="runs/mine", data={"path": "texts"}).train.batch_size
        16
    """

    out: Path
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "cpu"
    data: Data
    model: Model = Model()
    targets: Targets = Targets()
    train: Training = Training()
    attribution: Attribution = Attribution()

    @model_validator(mode="after")
    def _one_row_per_document(self) -> Config:
        if self.attribution.granularity == "token" and self.data.long == "split":
            raise ValueError(
                "attribution.granularity: token needs data.long: cut, so that a position is one token"
            )
        return self


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration from YAML.

    Args:
        path: the file. Paths in it are relative to the working directory.
        overrides: values that replace those of the file, by dotted key.

    Raises:
        InputError: the file cannot be read or a key of it cannot be used; the message gives the line, and for
            an unknown key the nearest valid one.

    Example:
        >>> from assay.demo import CORPUS, SETTINGS
        >>> config = load_config(SETTINGS, {"out": "runs/demo", "data.path": CORPUS, "train.steps": 3})
        >>> config.targets.by, config.train.steps
        ('domain', 3)
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path} cannot be read: {reason}; name a configuration in YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: {getattr(error, 'problem', None) or 'not valid YAML'}") from error
    except (ValueError, RecursionError) as error:  # a date that does not exist; brackets within brackets
        raise InputError(f"{path}: a value in it cannot be read ({error}): write it in quotes") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no configuration: expected keys such as 'out:' and 'data:'")
    for key, value in (overrides or {}).items():
        _put(content, key, value)
    lines = {key: line for key, line in _lines(yaml.compose(text)) if key not in (overrides or {})}
    return _validated(content, str(path), lines)


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A configuration with other values at some dotted keys.

    Raises:
        InputError: a key that does not exist, or a value that cannot be used.

    Example:
        >>> override(Config(out="runs/mine", data={"path": "texts"}), {"train.epochs": 3}).train.epochs
        3
    """
    content = config.model_dump(exclude_unset=True)
    for key, value in overrides.items():
        _put(content, key, value)
    return _validated(content, "--set", {})


def _validated(content: dict[str, Any], name: str, lines: Mapping[str, int]) -> Config:
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first, *others = error.errors()
        key = ".".join(map(str, first["loc"]))
        where = f"{name}, line {lines[key]}" if key in lines else name
        more = f" (and {len(others)} more)" if others else ""
        raise InputError(f"{where}: {_explain(first, key)}{more}") from error


def _put(content: dict[str, Any], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        content[section] = content.get(section) or {}
        content = content[section]
        if not isinstance(content, dict):
            raise InputError(f"{key} cannot be set: {section} is not a section")
    content[name] = value


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """The line of every dotted key, counted from one."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield prefix + str(name.value), name.start_mark.line + 1
            yield from _lines(value, f"{prefix}{name.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1


def _explain(error: ErrorDetails, key: str) -> str:
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(key)}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key}: {message}, not {error['input']!r}"


def _nearest(key: str) -> str:
    """Point to a key of the same section, else to one like it in another, else to all of the section."""
    section, _, name = key.rpartition(".")
    names = [candidate.rpartition(".") for candidate in _names(Config)]
    siblings = [last for parent, _, last in names if parent == section]
    if near := get_close_matches(name, siblings, n=1):
        return f"did you mean {'.'.join(filter(None, (section, near[0])))!r}?"
    for parent, _, last in names:
        if get_close_matches(name, [last], n=1, cutoff=0.8):
            return f"did you mean {'.'.join(filter(None, (parent, last)))!r}?"
    return f"valid here: {', '.join(siblings)}"


def _names(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from _names(kind, f"{prefix}{name}.")
